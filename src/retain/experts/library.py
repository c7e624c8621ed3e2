"""A library of experts: adapters of one base, a folder each, in PEFT's own format with a card beside it.

    experts/
      medicine/  adapter_config.json  adapter_model.safetensors  card.json  README.md
      poems/     …

An expert is written to a hidden folder and renamed when it is whole, so that no reader ever sees a half of one.
"""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from retain.errors import ConfigError, ModelError, unknown
from retain.experts.card import VERSION, ExpertCard
from retain.experts.names import can_be, check_name
from retain.results import write_text

CARD, README = "card.json", "README.md"
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_WRITING, _LEAVING = ".adding-", ".leaving-"
_STALE = 24 * 3600  # seconds after which a hidden folder is what a killed process left
_WAIT = 60  # seconds for another process that is changing the library


class ExpertLibrary:
    """Experts in a folder.

    Args:
        folder: made when the first expert is added.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    # -- read ----------------------------------------------------------------------------------------------
    def names(self) -> list[str]:
        """The experts, in alphabetical order."""
        if not self.folder.is_dir():
            return []
        return sorted(p.name for p in self.folder.iterdir() if not p.name.startswith(".") and (p / CARD).is_file())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and can_be(name) and (self.folder / name / CARD).is_file()

    def path(self, name: str) -> Path:
        """The folder of an expert.

        Raises:
            ConfigError: there is none of this name.
        """
        check_name(name)
        if name not in self:
            known = self.names()
            if not known:
                raise ConfigError(f"{self.folder}: no expert '{name}', and no other. Add one: `retain experts add`.")
            raise ConfigError(unknown(f"{self.folder}: experts", name, known))
        return self.folder / name

    def card(self, name: str) -> ExpertCard:
        """The card of an expert; its folder says what it is called.

        Raises:
            ConfigError: there is none of this name.
            ModelError: its card cannot be read.
        """
        file = self.path(name) / CARD
        try:
            return ExpertCard.model_validate_json(file.read_text(encoding="utf-8")).model_copy(update={"name": name})
        except FileNotFoundError:
            raise ConfigError(unknown(f"{self.folder}: experts", name, self.names())) from None  # removed just now
        except (OSError, ValueError) as error:
            problem = error.errors()[0] if isinstance(error, ValidationError) else None
            first = f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" if problem else str(error)
            raise ModelError(
                f"{file}: not a card of version {VERSION} ({first}). Remove the expert and add it again."
            ) from error

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Tells the weights of an expert from others that had its name before; None when there is no such expert."""
        try:
            found = os.stat(self.folder / name / _ADAPTER[1])
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def cards(self) -> dict[str, ExpertCard]:
        """All cards by name."""
        return {name: self.card(name) for name in self.names()}

    @property
    def base(self) -> str | None:
        """The model that all experts are for; None while there are none."""
        return next((self.card(name).base for name in self.names()), None)

    def known_base(self) -> str:
        """The model that all experts are for.

        Raises:
            ModelError: there are no experts, and so no base.
        """
        if (base := self.base) is None:
            raise ModelError(f"{self.folder}: no experts here, so no base. Add one first: `retain experts add`.")
        return base

    def require_free(self, name: str) -> None:
        """Refuse a name that is taken, also in another case, which some file systems take for the same.

        Raises:
            ConfigError: it is taken.
        """
        taken = {p.name.casefold(): p.name for p in self.folder.iterdir()} if self.folder.is_dir() else {}
        if (there := taken.get(name.casefold())) is not None:
            what = "an expert" if there in self else "something else"
            raise ConfigError(
                f"{self.folder}: '{there}' is there already, {what}. Choose another name, or remove it first: "
                f"`retain experts remove {there}`."
            )

    def require_base(self, base: str, name: str, digest: str | None = None) -> None:
        """Refuse another base than that of the experts that are here.

        Args:
            base: a model, as `model.name` takes it.
            name: of the expert that is to be on it.
            digest: its `base.identity`; found out when not given.

        Raises:
            ModelError: it is another one.
        """
        if digest is None:
            from retain.experts.base import identity

            digest = identity(base)
        for other, card in self.cards().items():
            same = digest == card.base_digest if digest and card.base_digest else base == card.base
            if not same:
                raise ModelError(
                    f"{self.folder}: '{name}' is for the base '{base}', and '{other}' here is for '{card.base}', which "
                    "has other weights. Keep one library per base (`--library`), or train it on this one."
                )

    # -- change --------------------------------------------------------------------------------------------
    def add(self, name: str, adapter: str | Path, *, base: str | None = None, **fields: Any) -> ExpertCard:
        """Copy an adapter into the library.

        Args:
            name: what it will be called.
            adapter: a PEFT folder.
            base: the model it is for; what its adapter_config.json says by default.
            fields: of the card, apart from those that the weights say.

        Raises:
            ConfigError: a name that cannot be, or is taken.
            ModelError: no adapter that can be an expert, or one of another base than the others.
        """
        from retain.experts.adapter import check, file_digest, settings
        from retain.experts.base import identity, short
        from retain.models.load import adapter_base

        check_name(name)
        self.require_free(name)
        source = Path(adapter)
        settings(source)
        base = short(base or adapter_base(source / _ADAPTER[0]))
        digest = identity(base)
        self.require_base(base, name, digest)
        found = check(source, base)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        card = ExpertCard(
            **{"created": now, **fields},
            name=name,
            base=base,
            base_digest=digest,
            rank=found.rank,
            bytes=found.bytes,
            digest=found.digest,
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = _hidden(self.folder, _WRITING)
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be written ({error.strerror}). Choose another folder.") from error
        try:
            for file in _ADAPTER:
                shutil.copyfile(source / file, partial / file)
            if file_digest(partial / _ADAPTER[1]) != found.digest:
                raise ModelError(
                    f"{source}: changed while it was copied. Add it again when it is no longer written to."
                )
            self._write(partial, card)
            with self._changing():
                self.require_free(name)
                self.require_base(base, name, digest)
                os.rename(partial, self.folder / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return card

    def remove(self, name: str) -> None:
        """Take an expert out; what was loaded of it stays usable until it is let go.

        Raises:
            ConfigError: there is none of this name.
        """
        with self._changing():
            leaving = _hidden(self.folder, _LEAVING)
            try:
                os.rename(self.path(name), leaving / name)  # gone at once, not file by file
            finally:
                shutil.rmtree(leaving, ignore_errors=True)

    def rename(self, name: str, new: str) -> ExpertCard:
        """Give an expert another name.

        Raises:
            ConfigError: there is none of this name, or the new one cannot be or is taken.
        """
        check_name(new)
        with self._changing():
            card, path = self.card(name).model_copy(update={"name": new}), self.path(name)
            if new.casefold() != name.casefold():
                self.require_free(new)
            if new != name:
                os.rename(path, self.folder / new)
                self._write(self.folder / new, card)
        return card

    def describe(self, name: str, **fields: Any) -> ExpertCard:
        """Change what an expert's card says: `description`, `language`, `keywords`, `examples`, …

        Raises:
            ConfigError: there is none of this name.
        """
        with self._changing():
            card = ExpertCard.model_validate(self.card(name).model_dump() | fields)
            self._write(self.path(name), card)
        return card

    def export(self, name: str, to: str | Path) -> Path:
        """Write an expert as a plain PEFT folder.

        Args:
            to: must not exist yet.

        Raises:
            ConfigError: there is no expert of this name, or something is there already.
        """
        source, target = self.path(name), Path(to)
        if target.exists():
            raise ConfigError(f"{target}: exists already. Choose a new folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _hidden(target.parent, f".{target.name}-")
        try:
            for file in (*_ADAPTER, README):
                shutil.copyfile(source / file, partial / file)
            os.rename(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return target

    # -- inside --------------------------------------------------------------------------------------------
    def _write(self, folder: Path, card: ExpertCard) -> None:
        write_text(folder / README, card.readme())
        write_text(folder / CARD, card.model_dump_json(indent=1) + "\n")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time; whatever a killed one left is cleared away."""
        from filelock import FileLock, Timeout

        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: no library here. Add an expert first: `retain experts add`.")
        try:
            with FileLock(self.folder / ".lock", timeout=_WAIT):
                self._clear()
                yield
        except Timeout:
            raise ConfigError(
                f"{self.folder}: another process has been changing it for {_WAIT} seconds. Try again later."
            ) from None

    def _clear(self) -> None:
        for path in self.folder.glob(".*-*"):
            left = path.name.startswith(_LEAVING)
            if left or (path.name.startswith(_WRITING) and time.time() - path.stat().st_mtime > _STALE):
                shutil.rmtree(path, ignore_errors=True)


def _hidden(folder: Path, prefix: str) -> Path:
    """A new folder that no reader looks at."""
    path = folder / f"{prefix}{secrets.token_hex(6)}"
    path.mkdir()
    return path
