"""The state of a run as files: weights and optimiser as safetensors, counters as JSON; no pickle anywhere.

    state.safetensors   weight/<name>, optimizer/<name>/<field>, random/torch, random/cuda/<device>, and what else a
                        run keeps: average/<name>, reference/<name>, mask/<name>, reward/<part>/<name>
    state.json          counters and controllers of the trainer, random states of Python and NumPy, and on what machine

When such a folder is written, kept and trusted is the business of `tracking/checkpoints.py`. Weights that are not
trained (a LoRA base, say) are not in it: they come from `policy.model`.
"""

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pertoken import native
from pertoken.errors import RunFolderError
from pertoken.policy.model import Policy


@dataclass(frozen=True)
class RandomStates:
    """All global random states at one moment."""

    tensors: dict[str, torch.Tensor]
    """Of torch: random/torch, and random/cuda/<device>."""
    python: Any
    numpy: dict[str, Any]

    @classmethod
    def of_now(cls) -> "RandomStates":
        tensors = {"random/torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors |= {f"random/cuda/{k}": state for k, state in enumerate(torch.cuda.get_rng_state_all())}
        return cls(tensors, random.getstate(), _numpy_state())


def state_writer(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    also: Mapping[str, torch.Tensor] = {},
    drawn: RandomStates | None = None,
    *,
    copied: bool = False,
) -> Callable[[Path], None]:
    """What writes weights and optimiser into a folder, and with them `state`, the tensors `also` and the random states
    `drawn`, or else those of now.

    copied: all of it as it is now, whenever it is written; that takes its memory once more. Else it is to be written at
    once.
    """
    drawn = RandomStates.of_now() if drawn is None else drawn
    tensors = _tensors(policy, optimizer, also) | drawn.tensors
    if copied:
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    content = {**state, "machine": machine(), "random": {"python": drawn.python, "numpy": drawn.numpy}}
    text = json.dumps(content)

    def write(folder: Path) -> None:
        try:
            save_file(tensors, folder / "state.safetensors")
        except SafetensorError as error:  # a full disk, for one; it inherits nothing that says so
            raise OSError(f"state.safetensors: {error}") from error
        (folder / "state.json").write_text(text, encoding="utf-8")

    return write


def machine() -> dict[str, str]:
    """What the last bits of a result depend on beside the run: where all of it is equal, results are."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
        "compiled code": "used" if native.available() else "not used",
        "processor": hashlib.sha256(native.processor().encode()).hexdigest()[:8],
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def moved(before: Any) -> list[str]:
    """A sentence on what is another here than where a checkpoint was made; `before` is its `machine()`."""
    now = machine()
    known = before if isinstance(before, dict) else {}
    others = [
        f"{name} {known[name]} there, {now[name]} here" for name in now if known.get(name, now[name]) != now[name]
    ]
    words = "from here on the last bits may be others than in a run that was never interrupted"
    return [f"{'; '.join(others)}: {words}"] if others else []


def state_size(policy: Policy, optimizer: torch.optim.Optimizer, also: Mapping[str, torch.Tensor] = {}) -> int:
    """About how many bytes `state_writer` writes."""
    return sum(tensor.nbytes for tensor in _tensors(policy, optimizer, also).values()) + (1 << 16)


def load_state(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, also: Mapping[str, torch.Tensor] = {}
) -> dict[str, Any]:
    """Put weights, optimiser, random states and the tensors `also` back in place; returns the rest of the state.

    Its entry `anew` lists those of `also` that the checkpoint has not, or of another shape: they are left as they were.
    """
    try:
        return _load_state(folder, policy, optimizer, also)
    except RunFolderError:
        raise
    except _UNREADABLE as error:
        raise RunFolderError(f"{folder}: not a readable checkpoint: {error!r}. Resume from an older one.") from error


_UNREADABLE = (
    OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, RuntimeError, SafetensorError,
)  # fmt: skip
"""What files that are anything but a checkpoint can raise, JSON of another shape among them."""


def _load_state(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, also: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    stored = _stored(folder, policy)
    torch_states = {name: tensor.cpu() for name, tensor in stored.items() if name.startswith("random/")}
    python, numpy = state.pop("random").values()
    named = policy.trainable()
    _refuse_other_policy(folder, named, stored)
    averages = {name: _averages_of(name, parameter, stored) for name, parameter in named.items()}
    _put(policy, stored)
    for name, parameter in named.items():
        if averages[name]:
            optimizer.state[parameter] = averages[name]
    state["anew"] = [name for name, cell in also.items() if name not in stored or stored[name].shape != cell.shape]
    with torch.no_grad():
        for name in also.keys() - set(state["anew"]):
            also[name].copy_(stored[name])
    _set_random_states(torch_states, python, numpy)
    return state


def _averages_of(name: str, parameter: torch.Tensor, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the optimiser keeps of a parameter: numbers, and tensors of its shape. The fused one does not look twice."""
    prefix = f"optimizer/{name}/"
    fields = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    for key, value in fields.items():
        if value.shape not in (parameter.shape, ()) or value.dtype != torch.float32:
            raise ValueError(
                f"{prefix}{key}: expected {list(parameter.shape)} in float32, got {list(value.shape)} in {value.dtype}"
            )
    return {key: value.clone() for key, value in fields.items()}


def load_weights(folder: Path, policy: Policy) -> None:
    """Put the weights of the checkpoint in `folder` in place, and nothing else of it; errors as of `load_state`."""
    try:
        stored = _stored(folder, policy, "weight/")
        _refuse_other_policy(folder, policy.trainable(), stored)
        _put(policy, stored)
    except RunFolderError:
        raise
    except _UNREADABLE as error:
        raise RunFolderError(f"{folder}: not a readable checkpoint: {error!r}. Take an older one.") from error


def _stored(folder: Path, policy: Policy, beginning: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint whose name has this beginning."""
    with safe_open(folder / "state.safetensors", framework="pt", device=str(policy.device)) as file:
        names = [name for name in file.keys() if name.startswith(beginning)]  # noqa: SIM118 - not a dict
        return {name: file.get_tensor(name) for name in names}


def _put(policy: Policy, stored: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in policy.trainable().items():
            parameter.copy_(stored[f"weight/{name}"])


def _tensors(
    policy: Policy, optimizer: torch.optim.Optimizer, also: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    tensors = {name: cell.contiguous() for name, cell in also.items()}
    for name, parameter in policy.trainable().items():
        tensors[f"weight/{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value.contiguous()
    return tensors


def _refuse_other_policy(folder: Path, named: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]) -> None:
    """The weights of a checkpoint belong to one policy: same names, same shapes."""
    weights = {name.removeprefix("weight/"): t.shape for name, t in stored.items() if name.startswith("weight/")}
    wanted = {name: parameter.shape for name, parameter in named.items()}
    different = sorted(name for name in weights.keys() | wanted.keys() if weights.get(name) != wanted.get(name))
    if different:
        first, more = different[0], f" (and {len(different) - 1} more)" if different[1:] else ""
        shapes = [list(found[first]) if first in found else "nothing" for found in (wanted, weights)]
        raise RunFolderError(
            f"{folder} belongs to a run of another policy: for {first}{more} this one needs {shapes[0]}, and the "
            f"checkpoint holds {shapes[1]}. Resume with the same model, LoRA and value head."
        )


def _numpy_state() -> dict[str, Any]:
    """The state of NumPy's global generator (its legacy one, MT19937) as JSON has it."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    words = np.asarray(keys).tolist()
    return {"kind": kind, "keys": words, "position": position, "has_gauss": has_gauss, "gauss": gauss}


def _set_random_states(torch_states: Mapping[str, torch.Tensor], python: Any, numpy: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch_states["random/torch"])
    devices = [name for name in torch_states if name.startswith("random/cuda/")]
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([torch_states[f"random/cuda/{k}"] for k in range(len(devices))])
    version, words, gauss = python
    random.setstate((version, tuple(words), gauss))
    keys = np.asarray(numpy["keys"], dtype=np.uint32)
    np.random.set_state((numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))
