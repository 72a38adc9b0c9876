"""Published softmax weights: their addresses, and the download of one file, checked by its SHA-256."""

import dataclasses
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tqdm import tqdm

from castling_jax.errors import InputError, check, check_known, in_one_sentence
from castling_jax.storage import as_path, sha256_of, try_folder

_DEIT = "https://dl.fbaipublicfiles.com/deit/deit_{}.pth"
_TIMM = "https://huggingface.co/timm/{}/resolve/main/pytorch_model.bin"
CHUNK = 2**20  # bytes
HUBS_DIGEST = "X-Linked-ETag"  # Hugging Face's header with the SHA-256 of a large file


@dataclasses.dataclass(frozen=True)
class Published:
    """A file of weights that its authors published.

    Attributes:
      url: the file's address.
      sha256: the first digits of the file's SHA-256; None if the server states it in HUBS_DIGEST.
      file: the name that the file gets here.
    """

    url: str
    sha256: str | None
    file: str


def _deit(name: str, digest: str) -> Published:
    """A file of DeiT's; by torch.hub's rule its name ends in the first eight digits of its SHA-256."""
    return Published(_DEIT.format(f"{name}-{digest}"), digest, f"deit_{name}-{digest}.pth")


# Model -> its file. LeViT's files have two heads, so the model needs distilled=True.
PUBLISHED = {
    "deit_tiny": _deit("tiny_patch16_224", "a1311bcf"),
    "deit_small": _deit("small_patch16_224", "cd65a155"),
    "deit_base": _deit("base_patch16_224", "b5f2ef4d"),
    "deit_tiny_distilled": _deit("tiny_distilled_patch16_224", "b40b3cf7"),
    "deit_small_distilled": _deit("small_distilled_patch16_224", "649709d9"),
    "deit_base_distilled": _deit("base_distilled_patch16_224", "df68dfff"),
    **{
        name: Published(_TIMM.format(f"{name}.fb_dist_in1k"), None, f"{name}.fb_dist_in1k.bin")
        for name in ("levit_128s", "levit_128", "levit_192", "levit_256", "levit_384")
    },
    **{
        name: Published(_TIMM.format(f"{name}.fb_in1k"), None, f"{name}.fb_in1k.bin")
        for name in ("mvitv2_tiny", "mvitv2_small", "mvitv2_base")
    },
}


def fetch(name: str, folder: str | os.PathLike = ".") -> Path:
    """Downloads a published file of weights for `init_from`, a teacher or `from_torch`, unless it is here already.

    A file on Hugging Face's server has its SHA-256 from there, so that the server is asked even if the file is here.

    Args:
      name: one of PUBLISHED.
      folder: the folder to put the file into.

    Returns:
      The file's path; its SHA-256 is checked in either case.

    Raises:
      InputError: the name is unknown, the server cannot be reached, or the file, here or there, is not the published
        one.
    """
    check_known("published weights", name, PUBLISHED)
    source = PUBLISHED[name]
    target = Path(as_path(folder)) / source.file
    if source.sha256 is not None and _is_here(target, source.sha256):
        return target
    try_folder(target.parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    redirects = _Redirects()
    try:
        with urllib.request.build_opener(redirects).open(source.url, timeout=60) as response:
            digest = (source.sha256 or redirects.digest or response.headers.get(HUBS_DIGEST, "")).strip('"')
            check(digest, f"{source.url} does not state its SHA-256, so the file cannot be checked.")
            if _is_here(target, digest):
                return target
            _download(response, temporary, source.file)
        if not sha256_of(temporary).startswith(digest):
            raise InputError(f"{source.url} is not the published file: its SHA-256 does not begin with {digest}.")
        temporary.replace(target)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        detail = in_one_sentence(getattr(error, "reason", error))
        raise InputError(f"{source.url} cannot be fetched ({detail}): is there a network?") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Remembers the digest that the first server states; the server that it redirects to does not state it."""

    digest = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.digest = self.digest or headers.get(HUBS_DIGEST, "")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_here(target: Path, digest: str) -> bool:
    """Whether the file is here.

    Raises:
      InputError: a file is here, but its SHA-256 does not begin with `digest`.
    """
    if not target.is_file():
        return False
    if not sha256_of(target).startswith(digest):
        raise InputError(f"'{target}' is not the published file, or only a part of it: remove it.")
    return True


def _download(response: Any, path: Path, name: str) -> None:
    """Downloads the file to `path`, with a progress bar called `name`."""
    size = int(response.headers.get("Content-Length", 0)) or None
    with path.open("wb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=name, disable=None) as bar:
        while chunk := response.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
