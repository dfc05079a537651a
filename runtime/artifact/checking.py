"""Whether an artifact's data are as they were compiled, to the last byte."""

from __future__ import annotations

from alloc_moe.runtime.artifact.digest import damaged_block
from alloc_moe.runtime.artifact.files import ArtifactFiles
from alloc_moe.runtime.artifact.torch_file import damaged_entry
from alloc_moe.runtime.errors import ArtifactError


def check_all(files: ArtifactFiles) -> dict[str, int]:
    """Return the size of each file that has the artifact's weights, after reading all.

    Raises:
        ArtifactError: A byte differs, or nothing says what they were.
    """
    if files.is_torch:
        return _check_archive(files)
    digests = files.digests()
    if missing := files.onnx.data_files.keys() - digests.keys():
        raise ArtifactError(
            f"{files.graph} has no digest of {min(missing)}, as an earlier version compiled it, so "
            "nothing can be checked. Compile the model again."
        )
    # Which block it is says more than that something is wrong, so that is looked for first.
    for name, path in files.data_paths().items():
        digest = digests[name]
        block = damaged_block(path, digest)
        if block is not None:
            start = block * digest.block
            end = min(start + digest.block, digest.size)
            raise ArtifactError(
                f"{path} is damaged, or belongs to another artifact: block {block} of "
                f"{len(digest.blocks)} (bytes {start} to {end}) differs from what "
                f"{files.graph.name} was compiled with. Copy both again."
            )
    files.check_data()
    return {name: digests[name].size for name in files.onnx.data_files}


def _check_archive(files: ArtifactFiles) -> dict[str, int]:
    entry = damaged_entry(files.graph)
    if entry is not None:
        raise ArtifactError(
            f"{files.graph} is damaged: {entry} in it differs from what was compiled. "
            "Copy it again."
        )
    return {files.graph.name: files.graph.stat().st_size}
