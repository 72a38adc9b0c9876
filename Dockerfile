# castling_jax on a TPU VM: docker build -t castling_jax . && docker run --privileged --net=host castling_jax doctor --tpu
# On a pod with XPK: xpk workload create --cluster=NAME --workload=castling --tpu-type=v5litepod-256 \
#   --docker-image=IMAGE --command="castling-jax train --config=deit:small --workdir=gs://BUCKET/deit-small"
FROM python:3.12-slim
WORKDIR /castling_jax
COPY . .
RUN pip install --no-cache-dir ".[tpu]"
ENTRYPOINT ["castling-jax"]
CMD ["--help"]
