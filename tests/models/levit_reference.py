"""LeViT's forward pass once more in plain float64 numpy, position by position: it shares no code with the package."""

import numpy as np

from castling_jax.models.variables import flatten
from tests.models import small
from tests.ops import reference


def hard_swish(x):
    return x * np.clip(x + 3, 0, 6) / 6


def every_second(x, grid):
    return x[:, [row * grid[1] + column for row in range(0, grid[0], 2) for column in range(0, grid[1], 2)]]


def bias_of(table, queries, keys, side):
    """[1, heads, queries, keys] of a table [heads, side * side], one pair of positions after another."""
    bias = np.zeros((1, len(table), len(queries), len(keys)))
    for i, (query_row, query_column) in enumerate(queries):
        for j, (row, column) in enumerate(keys):
            down, across = min(abs(query_row - row), side - 1), min(abs(query_column - column), side - 1)
            bias[0, :, i, j] = table[:, down * side + across]
    return bias


class Reference:
    """After `Reference(...)(images)`: features, densities, margin (see small.attend) and the new batch_stats, flat."""

    def __init__(
        self, variables, *, num_heads, key_dim, side, attention, threshold=None, token_conv="2d", training=False
    ):
        leaves = flatten(variables)
        self.leaves = {path: np.asarray(leaf, np.float64) for path, leaf in leaves.items()}
        self.num_heads, self.key_dim, self.side, self.token_conv = num_heads, key_dim, side, token_conv
        self.attention, self.threshold, self.training = attention, threshold, training
        self.features, self.densities, self.margin, self.batch_stats = [], [], np.inf, {}

    def of(self, *path):
        return self.leaves["/".join(path)]

    def norm(self, path, x):
        mean, var = self.of("batch_stats", path, "mean"), self.of("batch_stats", path, "var")
        if self.training:
            values = x.reshape(-1, x.shape[-1])
            new = {"mean": values.sum(0) / len(values)}
            new["var"] = ((values - new["mean"]) ** 2).sum(0) / len(values)
            for name, old in (("mean", mean), ("var", var)):
                self.batch_stats[f"{path}/{name}"] = 0.9 * old + 0.1 * new[name]
            mean, var = new["mean"], new["var"]
        return (x - mean) / np.sqrt(var + 1e-5) * self.of("params", path, "scale") + self.of("params", path, "bias")

    def linear(self, path, x):
        return self.norm(f"{path}/bn", x @ self.of("params", path, "linear/kernel"))

    def conv(self, path, x):
        kernel, (batch, height, width, _) = self.of("params", path, "linear/kernel"), x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        out = np.zeros((batch, (height + 1) // 2, (width + 1) // 2, kernel.shape[-1]))
        for row, column in np.ndindex(out.shape[1:3]):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            out[:, row, column] = np.einsum("brci,rcio->bo", window, kernel)
        return self.norm(f"{path}/bn", out)

    def attend(self, path, x, grid, num_heads):
        """One attention; it subsamples where it has keys and values alone in its fused projection."""
        subsampling = f"params/{path}/kv/linear/kernel" in self.leaves
        keys = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
        fused = self.linear(f"{path}/{'kv' if subsampling else 'qkv'}", x)
        width = num_heads * self.key_dim
        if subsampling:
            k, v = fused[..., :width], fused[..., width:]
            q = self.linear(f"{path}/q/ln", every_second(x, grid))
            own, queries = every_second(v, grid), [key for key in keys if key[0] % 2 == key[1] % 2 == 0]
            grid = ((grid[0] + 1) // 2, (grid[1] + 1) // 2)
        else:
            q, k, v = fused[..., :width], fused[..., width : 2 * width], fused[..., 2 * width :]
            own, queries = v, keys
        q, k, v, own = (part.reshape(*part.shape[:2], num_heads, -1) for part in (q, k, v, own))
        branch = "softmax_branch/" if self.attention in small.WITH_MASK else ""
        bias = None
        if self.attention in small.WITH_SOFTMAX or self.threshold is not None:
            bias = bias_of(self.of("params", path, f"{branch}attention_biases"), queries, keys, self.side)
            weights = reference.softmax(reference.scaled_scores(q, k, bias))
        density = 0.0
        if self.attention in small.WITH_SOFTMAX:
            out = np.einsum("bhqk,bkhd->bqhd", weights, v)
        elif self.attention in small.LINEAR:
            scale = f"params/{path}/focus_scale"
            out = small.LINEAR[self.attention](q, k, v, {"focus_scale": self.leaves.get(scale)})
        elif self.attention == "taylor":
            out, density = small.taylor(q, k, v, self.threshold, bias)
        elif self.attention == "angular":
            out = reference.normalize(np.einsum("bhqk,bkhd->bqhd", reference.kernel(q, k), v))
        elif self.threshold is None:
            out = reference.linear_angular(q, k, v, query_values=own)
        else:
            out, density = reference.castling(q, k, v, threshold=self.threshold, bias=bias, query_values=own)
        if self.threshold is not None:
            self.margin = min(self.margin, np.min(np.abs(weights - self.threshold)) / self.threshold)
        if self.attention not in small.WITHOUT_TAPS and self.token_conv == "2d":
            out = out + reference.convolve_grid(own, self.of("params", path, "token_kernel"), grid)
        if self.attention not in small.WITHOUT_TAPS and self.token_conv == "1d":
            out = out + reference.convolve_tokens(own, self.of("params", path, "token_kernel"))
        self.densities.append(density)
        return self.linear(f"{path}/proj/ln", hard_swish(out.reshape(*out.shape[:2], -1))), grid

    def mlp(self, path, x):
        return x + self.linear(f"{path}/ln2", hard_swish(self.linear(f"{path}/ln1", x)))

    def __call__(self, images):
        x = np.asarray(images, np.float64)
        for number in (1, 2, 3, 4):
            x = self.conv(f"stem/conv{number}", x)
            x = hard_swish(x) if number < 4 else x
        grid, own_side = x.shape[1:3], self.side
        x = x.reshape(len(x), -1, x.shape[3])
        for stage, num_heads in enumerate(self.num_heads):
            path = f"stages/{stage}/downsample"
            if stage > 0:
                x, grid = self.attend(f"{path}/attn_downsample", x, grid, x.shape[2] // self.key_dim)
                x = self.mlp(f"{path}/mlp", x)
                self.side = (self.side + 1) // 2
            block = 0
            while f"params/stages/{stage}/blocks/{block}/mlp/ln1/linear/kernel" in self.leaves:
                path = f"stages/{stage}/blocks/{block}"
                x = x + self.attend(f"{path}/attn", x, grid, num_heads)[0]
                x = self.mlp(f"{path}/mlp", x)
                block += 1
            self.features.append(x.reshape(len(x), *grid, -1))
        self.side = own_side
        pooled = x.mean(1)
        logits = [
            small.dense(
                self.norm(f"{head}/bn", pooled), {n: self.of("params", head, "linear", n) for n in ("kernel", "bias")}
            )
            for head in ("head", "head_dist")
            if f"params/{head}/linear/kernel" in self.leaves
        ]
        return np.mean(logits, axis=0)
