"""The job of one export: what is to be made, and its making, folder by folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sa_models.atomic_files import beside, new_folder, write_text
from sa_models.errors import PostshareError
from sa_models.export.gguf.file import GgufForm
from sa_models.export.gguf.form import gguf_form
from sa_models.export.gguf.layout import Kind
from sa_models.export.manifest import (
    WRITTEN_RECIPE,
    Identity,
    describe,
    recognize,
    seal,
    write_manifest,
)
from sa_models.export.model_card import gguf_name
from sa_models.export.peft_adapter import AdaptedReader, Pairs, load_adapter, save_adapter
from sa_models.export.verify import verify_bytes, verify_equal, verify_stored
from sa_models.heads import HeadLayout
from sa_models.materialize.reader import MaterializedReader
from sa_models.modeling import compact_config, select_units
from sa_models.plan import SharingPlan
from sa_models.savings import PlanSavings
from sa_models.weights.compact_folder import DenseReader, ExpandedFolder, dense_config
from sa_models.weights.companion_files import (
    copy_code,
    copy_terms,
    licence_of,
    require_tokenizer,
    tokenizer_folder,
    write_configs,
    write_tokenizer,
)
from sa_models.weights.safetensors_folder import ShardWriter, WeightsFolder
from sa_models.weights.stock_form import stock_form

Progress = Callable[[str, int, int], None]
"""Called with what is being done ("write", "verify"), bytes done, bytes in all."""


@dataclass
class ExportJob:
    """One call of :func:`~sa_models.export.export.export_model`, whose arguments it has.

    Attributes:
        weights: with the plan materialized, in ``dtype``.
        plan: the effective one.
        gguf: of the GGUF file, where one is to be made.
    """

    folder: Path
    weights: MaterializedReader | ExpandedFolder
    residual: Pairs | None
    plan: SharingPlan
    savings: PlanSavings
    identity: Identity
    dtype: torch.dtype
    shard_bytes: int
    base: Path | None
    tokenizer: Path | PreTrainedTokenizerBase | None
    written: str | None
    notes: dict[str, Any]
    progress: Progress
    gguf: GgufForm | None = None

    def gguf_form(self, to: Kind) -> GgufForm:
        """Raises PostshareError where GGUF cannot express the model."""
        tokenizer = self.tokenizer
        if isinstance(tokenizer, Path):
            require_tokenizer(tokenizer)
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
        origin = self.base or self.weights.path
        return gguf_form(
            dense_config(self.weights.config),
            self.plan,
            to,
            tokenizer,
            origin=origin,
            name=self.notes.get("name"),
            licence=licence_of(origin, origin),
        )

    def gguf_file(self, folder: Path) -> Path:
        """The file in the folder of the GGUF export."""
        assert self.gguf is not None
        return folder / gguf_name(self.notes.get("name"), self.gguf.layout.to)

    def identity_of(self, name: str) -> Identity:
        kind = self.gguf.layout.to if self.gguf is not None and name == "gguf" else None
        return replace(self.identity, gguf=kind)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of the tensors of each format, as the plan predicts them."""
        size = self.dtype.itemsize
        return {
            "compact": self.savings.stored_parameters * size,
            "dense": self.savings.dense_parameters * size,
            "adapter": sum(pair.parameters for pair in (self.residual or {}).values()) * size,
            "gguf": 0 if self.gguf is None else self.gguf.nbytes,
        }

    @cached_property
    def expanded(self) -> DenseReader:
        """The dense tensors with all units of a layer."""
        return self._adapted(self.weights, self.residual)

    @cached_property
    def dense(self) -> DenseReader:
        """The tensors of the dense form."""
        return stock_form(self.expanded, self.plan)

    @property
    def fewer_heads(self) -> HeadLayout | None:
        """The shape of the dense form, where it has fewer heads than the source."""
        of_source, of_dense = map(HeadLayout.from_config, (self.weights.config, self.dense.config))
        return None if of_dense == of_source else of_dense

    def _adapted(self, source: DenseReader, residual: Pairs | None) -> DenseReader:
        return source if residual is None else AdaptedReader(source, residual, self.plan)

    def is_finished(self, name: str) -> bool:
        """Whether this very export is there. Raises PostshareError when another one is."""
        path = self.folder / name
        if not path.exists():
            return False
        if recognize(path, self.identity_of(name), self.weights.shards()) or name == "adapter":
            return True  # the identity has the hash of an adapter's values
        # The source files are others, or were touched since: only the weights can tell.
        try:
            if self.gguf is not None and name == "gguf":
                self.gguf.verify(self.gguf_file(path), self.expanded)
                return True
            exported = ExpandedFolder(path) if name == "compact" else WeightsFolder(path)
            verify_equal(exported, self.dense if name == "dense" else self.weights)
        except (PostshareError, FileNotFoundError):
            raise PostshareError(
                f"{path} holds an export of other weights; choose another folder or delete it"
            ) from None
        return True

    def check_space(self, names: Sequence[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.sizes:
            shutil.rmtree(beside(self.folder / name), ignore_errors=True)
        needed = sum(self.sizes[name] for name in names)
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise PostshareError(
                f"the export needs {needed / 1e9:.3f} GB in {self.folder}, where "
                f"{free / 1e9:.3f} GB are free; free disk space or choose another folder"
            )

    @contextmanager
    def new_folders(self, names: Sequence[str]) -> Iterator[dict[str, Path]]:
        """Folders that get their names together; whatever happens, none is left half written."""
        try:
            with ExitStack() as stack:
                yield {name: stack.enter_context(new_folder(self.folder / name)) for name in names}
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise PostshareError(
                f"the export could not be written to {self.folder} ({reason}); free disk space or "
                "choose another folder, then export again"
            ) from error

    def make(self, folders: dict[str, Path]) -> None:
        """Write the formats, one after the other; then hash them while they are verified."""
        with ThreadPoolExecutor(1) as pool:  # one shard in memory, not one for each format
            stop = Event()
            try:
                advance = self._advance("write", sum(map(self._read_for, folders)))
                tasks = [
                    pool.submit(self._write_weights, kind, path, advance, stop)
                    for kind, path in folders.items()
                ]
                for task in tasks:
                    task.result()
                for kind, path in folders.items():
                    self._write_companions(kind, path)
                    if self.written is not None:
                        write_text(path / WRITTEN_RECIPE, self.written)
                sums = {kind: pool.submit(seal, path) for kind, path in folders.items()}
                self._verify(folders)
                for kind, path in folders.items():
                    facts = describe(
                        kind,
                        self.plan,
                        self.savings,
                        self.identity_of(kind),
                        self._parameters(kind),
                        self.sizes[kind],
                        self.fewer_heads,
                    )
                    files = sums[kind].result()
                    notes = {
                        **self.notes,
                        "recipe_file": None if self.written is None else WRITTEN_RECIPE,
                        "licence": licence_of(self.base or self.weights.path, path),
                    }
                    write_manifest(path, facts, files, self.weights.shards(), notes)
            finally:
                stop.set()

    def _write_weights(
        self, kind: str, path: Path, advance: Callable[[int], None], stop: Event
    ) -> None:
        if kind == "adapter":
            assert self.residual is not None
            save_adapter(path, self.residual)
            return
        if kind == "gguf":
            assert self.gguf is not None
            self.gguf.write(self.gguf_file(path), self.expanded, advance)
            return
        writer = ShardWriter(path, self.shard_bytes)
        for name, tensor, read in self._compact() if kind == "compact" else _whole(self.dense):
            if stop.is_set():
                return
            writer.add(name, tensor)
            advance(read)
        writer.close()

    def _parameters(self, kind: str) -> int:
        """Stored in a folder."""
        if self.gguf is not None and kind == "gguf":
            return self.gguf.parameters
        return self.sizes[kind] // self.dtype.itemsize

    def _compact(self) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Name and value of every compact tensor, and the bytes that were read for it."""
        if isinstance(self.weights, ExpandedFolder):
            for name in self.weights.files.names():
                tensor = self.weights.stored(name)
                yield name, tensor, tensor.nbytes
            return
        config = self.weights.config
        own = self.plan.own_units(self.plan.layout(config))
        lost = self.plan.dropped_names(self.plan.layout(config))
        for name, tensor, read in _whole(self.weights):
            where = HeadLayout.parse_name(name)
            if name in lost:
                continue
            if where is not None:
                layer, p = where
                tensor = select_units(tensor, own[layer][p], config, p)
            yield name, tensor, read

    def _write_companions(self, kind: str, path: Path) -> None:
        origin = tokenizer_folder(self.tokenizer)
        copy_terms(self.base or self.weights.path, origin, path)
        if kind in ("adapter", "gguf"):
            return
        config = dense_config(self.weights.config if kind == "compact" else self.dense.config)
        config.dtype = self.dtype
        if kind == "compact":
            config = compact_config(config, self.plan)
            copy_code(config, path)
        write_configs(config, path, [self.base, self.weights.path, origin])
        write_tokenizer(self.tokenizer, path)

    def _verify(self, folders: dict[str, Path]) -> None:
        readers: dict[str, DenseReader] = {
            kind: ExpandedFolder(path) if kind == "compact" else WeightsFolder(path)
            for kind, path in folders.items()
            if kind not in ("adapter", "gguf")
        }
        for kind, reader in readers.items():
            verify_bytes(reader.path, reader.shards(), self.sizes[kind])
        passes = min(1, len(readers)) if self.residual is None else len(readers)
        total = passes * self.sizes["dense"] + ("gguf" in folders) * self.sizes["gguf"]
        advance = self._advance("verify", total)
        if self.gguf is not None and "gguf" in folders:
            self.gguf.verify(self.gguf_file(folders["gguf"]), self.expanded, advance)
        residual = self.residual
        if "adapter" in folders:
            files = sorted(folders["adapter"].glob("*.safetensors"))
            verify_bytes(folders["adapter"], files, self.sizes["adapter"])
            residual = load_adapter(folders["adapter"])
        if isinstance(self.weights, ExpandedFolder) and "compact" in folders:
            verify_stored(ExpandedFolder(folders["compact"]), self.weights)
        if residual is None and readers:
            exported = readers.pop("compact", None) or readers.pop("dense")
            verify_equal(exported, readers.get("dense", self.dense), advance)
        if residual is None:
            return
        # Ties hold in the compact folder alone; what is added to it, in the dense one.
        compact, dense = readers.get("compact"), readers.get("dense")
        if compact is not None:
            verify_equal(compact, stock_form(self.weights, self.plan), advance)
        if dense is not None:
            adapted = self._adapted(compact or self.weights, residual)
            verify_equal(dense, stock_form(adapted, self.plan), advance)

    def _read_for(self, kind: str) -> int:
        """Bytes by which the writing of a format is counted: what is read, of GGUF what is
        written."""
        if kind == "compact" and self.plan.basis is None:
            return self.savings.expanded_parameters * self.dtype.itemsize
        return self.sizes[kind]

    def _advance(self, stage: str, total: int) -> Callable[[int], None]:
        """A counter of bytes, for any thread."""
        done, lock = 0, Lock()

        def advance(size: int) -> None:
            nonlocal done
            with lock:
                done += size
                self.progress(stage, done, total)

        return advance


def _whole(weights: DenseReader) -> Iterator[tuple[str, torch.Tensor, int]]:
    for name in weights.names():
        tensor = weights.read(name)
        yield name, tensor, tensor.nbytes
