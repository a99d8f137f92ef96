"""Checkpoints: trained weights and optimiser as safetensors, counters as JSON; no pickle anywhere.

    checkpoints/step-000050/state.safetensors   weight/<name>, optimizer/<name>/<field>, rng
    checkpoints/step-000050/state.json          format, step, controllers, counters

A checkpoint is written under a temporary name and renamed when it is complete, so a torn one is never taken
for a whole one. Weights that are not trained (a LoRA base, say) are not in it: they come from `policy.model`.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pertoken.errors import RunFolderError
from pertoken.policy.model import Policy

FORMAT_VERSION = 1


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write `folder/step-<step>` and remove all but the newest `keep`; raises RunFolderError if it cannot."""
    target, partial = folder / f"step-{step:06d}", folder / f".partial-{step:06d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_tensors(policy, optimizer), partial / "state.safetensors")
        content = {"format": FORMAT_VERSION, "step": step, **state}
        with open(partial / "state.json", "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own RuntimeError
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFolderError(
            f"cannot write the checkpoint {target}: {error}. Earlier checkpoints and logs are as they were. Free some "
            "space or choose another run folder, then resume."
        ) from error
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights, optimiser and random state back in place; returns the rest of the state."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state.get("format") != FORMAT_VERSION:
            raise RunFolderError(
                f"{path}: checkpoint format {state.get('format')}, this version reads {FORMAT_VERSION}."
            )
        with safe_open(path / "state.safetensors", framework="pt", device=str(policy.device)) as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{path}: not a readable checkpoint: {error}. Resume from an older one.") from error
    named = policy.trainable()
    missing = [name for name in named if f"weight/{name}" not in stored]
    if missing:
        raise RunFolderError(
            f"{path}: holds no weights for {missing[0]} (and {len(missing) - 1} more). It belongs to a run of another "
            "policy: same model, LoRA and value head are needed."
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(stored[f"weight/{name}"])
    for name, parameter in named.items():
        prefix = f"optimizer/{name}/"
        fields = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        if fields:
            optimizer.state[parameter] = {key: value.clone() for key, value in fields.items()}
    torch.set_rng_state(stored["rng"].cpu())
    return state


def _tensors(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {"rng": torch.get_rng_state()}
    for name, parameter in policy.trainable().items():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value.contiguous()
    return tensors
