"""The build step that `pyproject.toml` cannot say: the shelves go into the wheel.

`search/` and `proxies/` at the top of the repository hold content without Python; a wheel
carries them inside the package, under `proxyq/_shelf`, where `proxyq.shelf` finds them.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHELVES = ("search", "proxies")
KINDS = (".toml", ".json", ".md")


class BuildWithShelves(build_py):
    """`build_py`, then a copy of the shelves."""

    def _shelved(self) -> list[tuple[Path, Path]]:
        target = Path(self.build_lib) / "proxyq" / "_shelf"
        return [
            (file, target / file.relative_to(ROOT))
            for shelf in SHELVES
            for file in sorted((ROOT / shelf).rglob("*"))
            if file.suffix in KINDS and file.is_file()
        ]

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for source, target in self._shelved():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        outputs = super().get_outputs(include_bytecode)
        if self.editable_mode:
            return outputs
        return [*outputs, *(str(target) for _, target in self._shelved())]


setup(cmdclass={"build_py": BuildWithShelves})
