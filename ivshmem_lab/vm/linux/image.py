"""The image of a Linux guest: built from the distribution's packages, cached, found again."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .apt import Apt, read_depends, unpack
from .cpio import Archive
from .errors import LinuxImageError
from .kernel import UnpackerMissingError, extract_vmlinux
from .modules import WANTED, WELCOME, find_modules, load_order, modinfo, read_builtin, read_module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

CACHE_VARIABLE = "IVSHMEM_LAB_CACHE"

_KERNELS = {"debian": "linux-image-cloud-amd64", "ubuntu": "linux-image-virtual"}
"""By ``ID`` of /etc/os-release. Debian 12 is tested; Ubuntu goes the same way and was never tried."""
_KERNEL_PARTS = re.compile(r"linux-(image|modules)-(unsigned-)?\d")
_BUSYBOX = "busybox-static"
_INIT = Path(__file__).with_name("init.sh")
_KEPT = 2


@dataclass(frozen=True, slots=True)
class LinuxImage:
    """What a Linux guest starts from.

    Attributes
    ----------
    kernel, initrd : Path
    name : str
        The kernel's release, such as ``"6.1.0-56-cloud-amd64"``.
    packages : tuple of str
        The files of the packages it was made from.
    """

    kernel: Path
    initrd: Path
    name: str
    packages: tuple[str, ...] = ()


def cache_directory() -> Path:
    """Return the folder of everything that is fetched and built: ``$IVSHMEM_LAB_CACHE``, or in the user's cache."""
    named = os.environ.get(CACHE_VARIABLE)
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ivshmem-lab"
    return base.absolute() / "linux"


def find_image(tool: Path) -> LinuxImage | None:
    """Return the image that was built last, when this version of us with this tool would build it the same."""
    return _find(cache_directory(), _recipe(tool))


def build_image(tool: Path, *, refresh: bool = False, say: Callable[[str], None] = lambda _: None) -> LinuxImage:
    """Return the image, built when it is not there. Two processes at once build it once.

    Parameters
    ----------
    tool
        Our guest tool, a static ELF.
    refresh
        Look for newer packages, also when there is an image.
    say
        Called with what is being done.

    Raises
    ------
    LinuxImageError
        No apt, no network, no room, another processor, or a kernel that lacks something; with what to do.
    """
    if platform.machine() != "x86_64":
        raise LinuxImageError(f"the guests are x86-64 and so are the packages; this machine is {platform.machine()}")
    cache, recipe = cache_directory(), _recipe(tool)
    if not refresh and (found := _find(cache, recipe)):
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock", say):
            if not refresh and (found := _find(cache, recipe)):  # another process has built it meanwhile
                return found
            packages = _fetch(cache, refresh, say)
            return _build(cache, recipe, packages, tool, say)
    except OSError as error:
        raise LinuxImageError(
            f"the image of the Linux guest cannot be made in {cache}: {error}; it takes 250 MB there; "
            f"name another folder with {CACHE_VARIABLE}"
        ) from error


def _recipe(tool: Path) -> str:
    """Hash everything of ours that goes into an image."""
    digest = hashlib.sha256()
    for path in (tool, _INIT, *(Path(__file__).with_name(f"{name}.py") for name in ("image", "cpio", "modules"))):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(bytes(importlib.util.find_spec(package) is not None for package in ("lz4", "zstandard")))
    return digest.hexdigest()


def _find(cache: Path, recipe: str) -> LinuxImage | None:
    latest = _read_json(cache / "latest.json")
    if latest.get("recipe") != recipe:
        return None
    place = cache / "images" / str(latest.get("image"))
    image = LinuxImage(place / "kernel", place / "initrd", str(latest.get("name")), tuple(latest.get("packages", ())))
    return image if image.kernel.is_file() and image.initrd.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that builds the image")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(cache: Path, refresh: bool, say: Callable[[str], None]) -> list[Path]:
    """Return the packages to build from; those of the last image where nobody asked for newer ones."""
    kept = [cache / "apt" / "packages" / name for name in _read_json(cache / "latest.json").get("packages", ())]
    if kept and not refresh and all(path.is_file() for path in kept):
        return kept
    apt = Apt(cache / "apt", say)
    distribution = platform.freedesktop_os_release()
    known = next(
        (name for name in (distribution["ID"], *distribution.get("ID_LIKE", "").split()) if name in _KERNELS), ""
    )
    if not known:
        raise LinuxImageError(
            f"no kernel package is known for {distribution.get('PRETTY_NAME')}; there are those of "
            f"{' and '.join(_KERNELS)}; give a kernel of your own with --kernel and --initrd"
        )
    apt.update()
    found = [apt.fetch(_BUSYBOX)]
    todo, seen = [_KERNELS[known]], set[str]()
    while todo:  # from the meta package to the kernel and, on Ubuntu, to its modules
        package = todo.pop()
        if package not in seen:
            seen.add(package)
            found.append(apt.fetch(package))
            todo += [name for name in read_depends(found[-1]) if _KERNEL_PARTS.match(name)]
    return found


def _build(cache: Path, recipe: str, packages: Sequence[Path], tool: Path, say: Callable[[str], None]) -> LinuxImage:
    names = tuple(path.name for path in packages)
    key = hashlib.sha256("\n".join([recipe, *names]).encode()).hexdigest()[:16]
    images = cache / "images"
    images.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="new-", dir=images) as place:
        root = Path(place) / "root"
        say("unpacking the kernel")
        for package in packages:
            unpack(package, root)
        (Path(place) / "image").mkdir()
        name = _write(root, Path(place) / "image", tool, say)
        if not (images / key).is_dir():  # the same packages and recipe give the same image
            (Path(place) / "image").replace(images / key)
    latest = {"image": key, "recipe": recipe, "name": name, "packages": names}
    temporary = cache / "latest.json.new"
    temporary.write_text(json.dumps(latest, indent=2))
    temporary.replace(cache / "latest.json")
    _tidy(images, cache / "apt" / "packages", key, names)
    return LinuxImage(images / key / "kernel", images / key / "initrd", name, names)


def _write(root: Path, target: Path, tool: Path, say: Callable[[str], None]) -> str:
    """Write kernel and initrd from unpacked packages; return the kernel's release."""
    kernels = sorted(root.glob("boot/vmlinuz-*"))
    busybox = next((path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.is_file()), None)
    if len(kernels) != 1 or busybox is None:
        raise LinuxImageError(
            f"the packages hold {len(kernels)} kernels and {'a' if busybox else 'no'} busybox; allowed is one of each"
        )
    name = kernels[0].name.removeprefix("vmlinuz-")
    compressed = kernels[0].read_bytes()
    try:
        (target / "kernel").write_bytes(extract_vmlinux(compressed))
    except UnpackerMissingError as error:
        say(f"{error}; the guest unpacks it itself until then, a little slower")
        (target / "kernel").write_bytes(compressed)
    say("making the initramfs")
    trees = [path for path in (root / "lib/modules" / name, root / "usr/lib/modules" / name) if path.is_dir()]
    files = {module: path for tree in trees for module, path in find_modules(tree).items()}
    builtin = [module for tree in trees for module in read_builtin(tree)]
    contents: dict[str, bytes] = {}

    def depends(module: str) -> str:
        contents[module] = read_module(files[module])
        return modinfo(contents[module]).get("depends", "")

    order = load_order([*WANTED, *(each for each in WELCOME if each in files)], files, builtin, depends)
    archive = Archive()
    archive.file("init", _INIT.read_bytes(), executable=True)
    archive.file("bin/busybox", busybox.read_bytes(), executable=True)
    archive.symlink("bin/sh", "busybox")
    archive.file("bin/ivshmem-tool", tool.read_bytes(), executable=True)
    for module in order:
        archive.file(f"modules/{module}.ko", contents[module])
    archive.file("modules/order", "".join(f"{module}.ko\n" for module in order).encode())
    (target / "initrd").write_bytes(gzip.compress(archive.to_bytes(), mtime=0))
    return name


def _tidy(images: Path, packages: Path, key: str, names: Sequence[str]) -> None:
    """Delete what nobody needs: packages of other versions, all images but this and the one before."""
    old = sorted(
        (path for path in images.iterdir() if path.is_dir() and path.name != key and not path.name.startswith("new-")),
        key=lambda path: path.stat().st_mtime,
    )
    for path in old[: max(0, len(old) - _KEPT + 1)]:
        shutil.rmtree(path, ignore_errors=True)
    for path in packages.glob("*.deb"):
        if path.name not in names:
            path.unlink(missing_ok=True)
