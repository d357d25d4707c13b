"""The options that describe a study on the command line, shared by ``plan`` and ``sweep``, and how they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from ..errors import StudyError

MOST = 1_000_000  # numbers of one option, so that a slip of the keyboard is an error and no hang
_DIGITS = 30

_DTYPES = ("float64", "float32", "float16", "bfloat16")
_MANY = ". Repeat for several."

Model = Annotated[
    str,
    typer.Argument(
        help="emoji (packaged), a folder saved by diffusers, a hub id, or random:tiny-sd15 (random weights).",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Request:
    """What was asked for: a model, prompts, and those arguments of `fasttrace.Study` that were given."""

    model: str
    device: str | None
    dtype: str | None
    preset: str | None
    prompts: Any
    settings: dict[str, Any]

    def study(self) -> Any:
        """Load the model and make the study.

        Raises:
            FasttraceError: anything about the request that cannot be; nothing has been run or written by then.
        """
        import torch

        from ..pipeline import load_pipeline
        from ..study.presets import default_metrics, preset_study
        from ..study.study import Study

        check_device(self.device)
        if self.dtype is not None and self.dtype not in _DTYPES:
            raise StudyError(f"--dtype {self.dtype!r}: expected {', '.join(_DTYPES)}")
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        pipe = load_pipeline(self.model, device=self.device, dtype=dtype)
        settings = dict(self.settings)
        if self.preset is not None:
            return preset_study(self.preset, pipe, self.prompts, **settings)
        settings.setdefault("metrics", default_metrics(self.model, settings.get("protocol", "free")))
        return Study(pipe, self.prompts, **settings)

    def describe(self) -> str:
        """What a preset fixes, for a person; empty without one."""
        from ..study.presets import find_preset

        return "" if self.preset is None else f"{find_preset(self.preset).describe()}\n\n"


def _option(text: str, panel: str) -> Any:
    return typer.Option(help=text, show_default=False, rich_help_panel=panel)


def read_request(
    model: Model,
    prompt: Annotated[list[str] | None, _option("A caption; needs --subject" + _MANY, "Prompts")] = None,
    subject: Annotated[list[str] | None, _option("The words of it to noise, one for each --prompt.", "Prompts")] = None,
    attribute: Annotated[str | None, _option("What the subject expresses: a label (object).", "Prompts")] = None,
    target: Annotated[str | None, _option("Another caption, for --source target.", "Prompts")] = None,
    prompts: Annotated[
        str | None, _option("A JSONL file of prompts, or a packaged set such as objects or emoji.", "Prompts")
    ] = None,
    preset: Annotated[
        str | None, _option("quick or paper: settings to start from; options override them.", "Study")
    ] = None,
    sites: Annotated[
        list[str] | None,
        _option("unet (the default), text, all, a name or glob; 'A + B' is restored together" + _MANY, "Study"),
    ] = None,
    positions: Annotated[
        list[str] | None,
        _option("Text sites: each (default), tokens, all, subject, subject_last, eos, pad, or 3,4" + _MANY, "Study"),
    ] = None,
    steps: Annotated[
        list[str] | None,
        _option("Restored denoising steps: all (default), each, 0-9, 0,5, or windows:WIDTH[:STRIDE]" + _MANY, "Study"),
    ] = None,
    windows: Annotated[int | None, _option("Adjacent layers restored together (1).", "Study")] = None,
    protocol: Annotated[str | None, _option("free (default) or teacher_forced.", "Study")] = None,
    base: Annotated[
        str | None, _option("corrupted: restore (default); clean: noise one site at a time.", "Study")
    ] = None,
    source: Annotated[
        str | None, _option("What a patch writes: clean, corrupted, target, empty, zero, mean, inject:target.", "Study")
    ] = None,
    branch: Annotated[str | None, _option("Branch of guidance that is patched: cond (default), both.", "Study")] = None,
    noise: Annotated[
        str | None, _option("Noise on the subject's embeddings: 3x (default: 3 x their spread), or a number.", "Study")
    ] = None,
    samples: Annotated[int | None, _option("Noise samples a prompt (1).", "Study")] = None,
    metric: Annotated[
        list[str] | None,
        _option("clip_score, clip_score:FOLDER_OR_HUB_ID, latent_cosine, latent_l2, noise_l2" + _MANY, "Study"),
    ] = None,
    seeds: Annotated[str | None, _option("Seeds of the pictures: 0,1 or 0-3 (0).", "Study")] = None,
    num_inference_steps: Annotated[int | None, _option("Denoising steps (20).", "Denoising")] = None,
    guidance_scale: Annotated[float | None, _option("Classifier-free guidance (7.5).", "Denoising")] = None,
    negative_prompt: Annotated[str | None, _option("Text of the unconditional branch (empty).", "Denoising")] = None,
    scheduler: Annotated[
        str | None, _option("ddim, pndm, euler, euler_ancestral, dpm, ... (the model's own).", "Denoising")
    ] = None,
    eta: Annotated[float | None, _option("Of DDIM (0).", "Denoising")] = None,
    device: Annotated[str | None, _option("cuda, cpu, ... (the GPU if there is one).", "Denoising")] = None,
    dtype: Annotated[str | None, _option("float32, float16 or bfloat16.", "Denoising")] = None,
) -> Request:
    """Read the options of a study.

    Raises:
        StudyError: one that cannot be read; names the option.
    """
    given = {
        "sites": None if sites is None else [_site(one) for one in sites],
        "positions": None if positions is None else _one_or_list([_positions(one) for one in positions]),
        "steps": None if steps is None else _one_or_list([_steps(one) for one in steps]),
        "seeds": None if seeds is None else numbers(seeds, "--seeds"),
        "windows": windows, "protocol": protocol, "base": base, "source": source, "branch": branch, "metrics": metric,
        "num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "scheduler": scheduler,
        "negative_prompt": negative_prompt, "eta": eta, "corruption": _corruption(noise, samples),
    }  # fmt: skip
    settings = {name: value for name, value in given.items() if value is not None}
    chosen = _prompts(prompt, subject, attribute, target, prompts)
    return Request(model, device, dtype, preset, chosen, settings)


def takes_study(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of a study, which it receives as its first argument, ``request``."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    shared = list(inspect.signature(read_request, eval_str=True).parameters.values())
    names = {parameter.name for parameter in shared}

    def call(**values: Any) -> None:
        request = read_request(**{name: value for name, value in values.items() if name in names})
        command(request, **{name: value for name, value in values.items() if name not in names})

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*shared, *own)]
    )
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in (*shared, *own)}
    return call


def check_device(name: str | None) -> None:
    """Refuse a device that is unknown, or not there, before anything is loaded.

    Raises:
        StudyError: names the devices that can be given.
    """
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StudyError(f"--device {name!r}: expected cpu, cuda, cuda:0 or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise StudyError(f"--device {name!r}: expected cpu, cuda, cuda:0 or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StudyError(f"--device {name!r}: {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise StudyError(f"--device {name!r}: there is no such device here; use --device cpu")


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers written as ``0,1`` or ``0-3``.

    Raises:
        StudyError: anything else.
    """
    found: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise StudyError(f"{option} {text!r}: expected whole numbers such as 0,1 or 0-3")
        if dash and int(last) < int(first):
            raise StudyError(f"{option} {text!r}: the range {piece.strip()} is empty; write the smaller number first")
        if len(first) > _DIGITS or len(last) > _DIGITS:
            raise StudyError(f"{option} {text[:40]!r}: a number of more than {_DIGITS} digits")
        if int(last or first) - int(first) + len(found) >= MOST:
            raise StudyError(f"{option} {text[:40]!r}: more than {MOST:,} numbers; split the study")
        found += range(int(first), int(last or first) + 1)
    return found


def _site(text: str) -> str | tuple[str, ...]:
    members = tuple(piece.strip() for piece in text.split(" + "))
    return members if len(members) > 1 else text


def _positions(text: str) -> str | list[int]:
    return numbers(text, "--positions") if text[:1].isdecimal() else text


def _steps(text: str) -> Any:
    if text == "all":
        return None
    if text == "each":
        return "each"
    if text.startswith("windows:"):
        width, _, stride = text.removeprefix("windows:").partition(":")
        if not width.isdecimal() or (stride and not stride.isdecimal()):
            raise StudyError(f"--steps {text!r}: expected windows:WIDTH or windows:WIDTH:STRIDE, as in windows:5:5")
        return {"width": int(width), "stride": int(stride or 1)}
    return numbers(text, "--steps")


def _one_or_list(values: Sequence[Any]) -> Any:
    return values[0] if len(values) == 1 else list(values)


def _corruption(noise: str | None, samples: int | None) -> Any:
    if noise is None and samples is None:
        return None
    from ..corruption import GaussianNoise

    return GaussianNoise(noise if noise is not None else "3x", samples=1 if samples is None else samples)


def _prompts(
    texts: list[str] | None, subjects: list[str] | None, attribute: str | None, target: str | None, file: str | None
) -> Any:
    if file is not None:
        if texts or subjects or target or attribute:
            raise StudyError(
                "--prompts excludes --prompt, --subject, --attribute and --target: put all of it into the file, or none"
            )
        from ..study.promptsets import load_prompts

        return load_prompts(file)
    if not texts or not subjects:
        raise StudyError('no prompts: give --prompt "a red apple" --subject apple, or --prompts FILE.jsonl')
    if len(texts) != len(subjects):
        raise StudyError(f"{len(texts)} --prompt but {len(subjects)} --subject: give one subject for each prompt")
    from ..prompts import Prompt

    return [
        Prompt(text, subject, attribute=attribute or "object", target=target)
        for text, subject in zip(texts, subjects, strict=True)
    ]
