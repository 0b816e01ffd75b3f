"""From the keywords of `AceStepPipeline.__call__` to a request for each song."""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from acestep_jax.arguments import arguments, describe, is_key, repeatable
from acestep_jax.errors import InputError
from acestep_jax.request import Planning, Request, Sampling, split

P = ParamSpec("P")
R = TypeVar("R")


def takes(kind: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[Concatenate[Any, P], R]]:
    """Give a method the parameters of the dataclass `kind`: in its signature, for editors and `help()`; in its
    docstring, with their help texts; and as positional arguments."""
    parameters = list(inspect.signature(kind).parameters.values())
    names = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    dataclass = cast(type, kind)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

    def decorate(method: Callable[..., R]) -> Callable[Concatenate[Any, P], R]:
        extra = [p for p in inspect.signature(method).parameters.values() if p.kind is p.KEYWORD_ONLY]

        @functools.wraps(method)
        def call(self: Any, *args: Any, **keywords: Any) -> R:
            if len(args) > len(names):
                raise InputError(f"expected at most {len(names)} positional arguments, found {len(args)}")
            for name, value in zip(names, args, strict=False):
                if name in keywords:
                    raise InputError(f"{name}: given twice, by position and by keyword")
                keywords[name] = value
            return method(self, **keywords)

        signature = inspect.signature(method)
        call.__signature__ = signature.replace(parameters=[own, *parameters, *extra])  # type: ignore[attr-defined]
        # Python 3.13 compiles docstrings without their indentation, earlier ones with it.
        lines = [f"    {name}: {describe(name, dataclass)}" for name in arguments(dataclass)]
        call.__doc__ = inspect.cleandoc(method.__doc__ or "").replace("    {arguments}", "\n".join(lines))
        return call  # type: ignore[return-value]

    return decorate


@runtime_checkable
class Planned(Protocol):
    """An object that can be converted to a request, such as a plan."""

    def request(self) -> Request: ...


def requests_of(keywords: Mapping[str, Any]) -> tuple[list[Request], Planning, Sampling]:
    """Return a request for each prompt, and how the requests are planned and sampled.

    A prompt may also be a `Request`, which is used as it is, or a plan, whose fields the other keywords override. Every
    value may be a list with one value for each prompt, except for fields that take several values themselves.

    Args:
        keywords: fields of `Arguments`. With a single seed s, song i gets the seed s + i; `latents` is [B, frames, C].

    Raises:
        InputError: if a name is unknown, there is no prompt, a list has the wrong length, a seed is invalid, or a
            `Request` is combined with values for its own fields.
    """
    values, planned, sampled = split(keywords)
    if "prompt" not in values:
        raise InputError("prompt: missing; describe the music in a few words")
    prompt = values.pop("prompt")
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts:
        raise InputError("prompt: the list is empty; give at least one")
    count, fields = len(prompts), arguments(Request)
    defaults: dict[str, Any] = {name: field.default for name, (field, _) in fields.items()}
    latents = values.pop("latents", None)
    columns = {"seed": _seed_of_each(values.pop("seed", None), count)}
    columns["latents"] = [None] * count if latents is None else list(np.asarray(latents, np.float32))
    for name, value in values.items():
        each = isinstance(value, list | tuple) and not repeatable(fields[name][0].type)
        columns[name] = list(value) if each else [value] * count
    for name, column in columns.items():
        if len(column) != count:
            raise InputError(f"{name}: expected one or {count}, one for each prompt, found {len(column)}")
    requests = []
    for i, item in enumerate(prompts):
        own = {name: column[i] for name, column in columns.items()}
        given = {k: v for k, v in own.items() if v is not None and not np.array_equal(v, defaults[k])}
        if isinstance(item, Planned) and callable(item.request):
            item = dataclasses.replace(item.request(), **given)
        elif not isinstance(item, Request):
            item = Request(cast(str, item), **own)
        elif given:
            raise InputError(f"{next(iter(given))}: prompt {i} is a Request, which has its own; set it there")
        requests.append(item)
    return requests, Planning(**planned), Sampling(**sampled)


def _seed_of_each(seed: Any, count: int) -> list[Any]:
    """Return a number or key for each song, or None."""
    if seed is None:
        return [None] * count
    if is_key(seed):
        bits = jnp.asarray(np.asarray(jax.random.key_data(seed)))
        keys = jax.random.wrap_key_data(bits, impl=jax.random.key_impl(seed))
        return list(jax.vmap(jax.random.fold_in, (None, 0))(keys, np.arange(count)) if keys.ndim == 0 else keys)
    try:
        seeds = [operator.index(s) for s in np.atleast_1d(np.asarray(seed)).tolist()]
    except TypeError:
        raise InputError(f"seed: expected whole numbers or a key of jax.random.key, found {seed!r}") from None
    return seeds if isinstance(seed, Sequence) or np.ndim(seed) else [seeds[0] + i for i in range(count)]
