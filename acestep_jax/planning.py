"""Planning: turns a few words into a plan, and decides which requests are planned before generation."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, overload

import jax
from tqdm import tqdm

from acestep_jax.converting import CodecModel
from acestep_jax.distributed import spans_processes
from acestep_jax.errors import InputError
from acestep_jax.inputs import tasks
from acestep_jax.inputs.keywords import requests_of
from acestep_jax.inputs.prepare import codebook_size
from acestep_jax.inputs.settings import compat_of
from acestep_jax.io.planner_files import WHERE
from acestep_jax.memory import needed_bytes
from acestep_jax.placement import first_device, memory_limit
from acestep_jax.planner.plan import Plan
from acestep_jax.planner.plans import seeds_of, write_plans
from acestep_jax.planner.tokenizer import PlannerTokenizer
from acestep_jax.planner.writer import Planner, ProgressCallback
from acestep_jax.request import Planning, Request, Sampling, split

logger = logging.getLogger(__name__)

Wish = str | Request | Plan


class PlanningModel(CodecModel):
    """A loaded model whose planner, if it has one, is loaded on first use."""

    _planner: Planner | None = None
    _is_given = False  # whether the user set the planner, so that it cannot be loaded again
    _is_missing = False  # whether an earlier search found none

    @property
    def planner(self) -> Planner:
        """The planner. The first access finds and loads it; see `unload_planner`.

        Raises:
            InputError: if there is no planner, or it cannot be downloaded or read.
        """
        if self._planner is None:
            if self.planner_source is None:
                raise InputError(f"planner: a manually constructed model has none; set pipe.planner; {WHERE}")
            loaded = self.planner_source.load(self.mesh)
            self._planner = Planner(loaded.network, PlannerTokenizer.from_folder(loaded.folder), self.mesh)
        return self._planner

    @planner.setter
    def planner(self, planner: Planner | None) -> None:
        self._planner, self._is_given = planner, planner is not None

    def unload_planner(self) -> None:
        """Free the memory of the planner. It is loaded again on the next use."""
        self._planner = None

    def _thinks(self, planning: Planning, sampling: Sampling) -> bool:
        """Return whether requests are planned: by default, if there is a planner. If the model's own planner cannot be
        loaded, log a warning; if it is one that the user named, raise the error."""
        if planning.thinking is not None:
            return planning.thinking
        if not compat_of(sampling).thinking:
            return False
        source = self.planner_source
        if self._planner is None and (source is None or self._is_missing or not source.is_possible):
            return False
        try:
            return self.planner is not None
        except (InputError, OSError, jax.errors.JaxRuntimeError) as error:
            # Several processes on one mesh must all do the same.
            if source is None or source.named or spans_processes(self.mesh):
                raise
            logger.warning("thinking: the planner is not used (%s); thinking=False silences this warning", error)
            self._is_missing = True
            return False

    def free_if_needed(self) -> None:
        """Free the planner's memory if the networks of a song need it; see `unload_planner`."""
        if self.needs_memory_of_planner():
            logger.info("planner: unloaded, because the song needs its memory")
            self.unload_planner()

    def needs_memory_of_planner(self) -> bool:
        """Return whether a planner is in memory that does not fit together with the networks of a song."""
        limit = memory_limit(first_device())
        if limit is None or self._planner is None or self._is_given:
            return False
        network = self._planner.model
        planner_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(network))
        kind = self.transformer.runtime.quantization if self.transformer is not None else None
        needed = needed_bytes(self.configs, network.runtime.param_dtype, jax.default_backend(), quantization=kind)
        needed += self.placement.second_copy
        devices = 1 if self.mesh is None else self.mesh.size
        return self.placement.offloads or planner_bytes + needed > limit * devices

    @overload
    def plan(self, wish: Wish, **keywords: Any) -> Plan: ...
    @overload
    def plan(self, wish: Sequence[Wish], **keywords: Any) -> list[Plan]: ...
    def plan(
        self,
        wish: Wish | Sequence[Wish],
        *,
        instrumental: bool = False,
        codes: bool = True,
        on_progress: ProgressCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
        **keywords: Any,
    ) -> Plan | list[Plan]:
        """Return a plan: caption, lyrics, metadata and audio codes. The planner keeps every field that is given, and
        writes the others to match.

        Args:
            wish: a few words, such as "a sad song about the sea", for which the planner writes a caption and lyrics;
                a `Request`, or words together with `lyrics`, which are kept; or a plan, which gets new codes. A list
                of these, all of one kind, is a batch.
            instrumental: whether the song is to have no vocals.
            codes: whether to write audio codes as well.
            on_progress: called with the number of codes written so far, and in total.
            should_stop: called regularly; if it returns true, the call ends.
            keywords: fields of `Planning` and, where the wish is words, of `Request`.

        Raises:
            InputError: if there is no planner, an argument is unknown or out of range, or a text is too long.
            Cancelled: if `should_stop` returned true.
        """
        requested, planning = split_planning(keywords)
        if instrumental and requested.get("lyrics"):
            raise InputError("instrumental, lyrics: expected one of them, found both")
        items = list(wish) if isinstance(wish, list | tuple) else [wish]
        requests, *_ = requests_of(requested | dict(prompt=items))
        are_plans = [isinstance(item, Plan) for item in items]
        are_wishes = [isinstance(i, str) and not r.lyrics for i, r in zip(items, requests, strict=True)]
        if any(len(set(each)) > 1 for each in (are_plans, are_wishes)):
            raise InputError("wish: expected a batch of only words, only requests or only plans, found several kinds")
        if are_plans[0]:  # their text is kept
            planning = dataclasses.replace(planning, use_cot_caption=False)
        with self.on_mesh(), _watched(on_progress) as progress:
            plans = write_plans(
                self.planner,
                requests,
                planning,
                mode="inspire" if are_wishes[0] else "generate",
                instrumental=instrumental,
                codes=codes,
                joint=spans_processes(self.mesh),
                on_progress=progress,
                should_stop=should_stop,
            )
        plans = [
            dataclasses.replace(plan, prompt=item.prompt) if isinstance(item, Plan) else plan
            for plan, item in zip(plans, items, strict=True)
        ]
        return plans if isinstance(wish, list | tuple) else plans[0]

    def rewrite(self, prompt: str, lyrics: str = "", **keywords: Any) -> Plan:
        """Return a more detailed caption, lyrics in the model's format, and metadata, without audio codes.

        Args:
            keywords: fields of `Request`, which are kept, and of `Planning`.

        Raises:
            InputError: see `plan`.
        """
        requested, planning = split_planning(keywords)
        request, joint = Request(prompt, lyrics, **requested), spans_processes(self.mesh)
        with self.on_mesh(), _watched(None) as progress:
            return write_plans(
                self.planner, [request], planning, mode="format", codes=False, joint=joint, on_progress=progress
            )[0]

    def planned(
        self,
        requests: Sequence[Request],
        planning: Planning,
        sampling: Sampling,
        *,
        finished: Collection[int] = (),
        seeds: Sequence[int] | None = None,
        keep: bool = False,
        on_progress: ProgressCallback | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> list[tuple[Request, Plan | None]]:
        """Return each request together with its plan, or unchanged if it is not planned, see `Planning.thinking`.

        A request without a seed gets one here, so that its plan and its noise use the same seed.

        Args:
            finished: indices of requests that come from plans, which are planned again only with `thinking=True`.
            seeds: seed of the plan for each request; None: see `Planning.lm_seed`.
            keep: whether to keep the planner in memory for further requests even if a song needs its memory; see
                `free_if_needed`.
            on_progress, should_stop: see `plan`.

        Raises:
            InputError: if a plan is requested but there is no planner; or see `plan`.
            Cancelled: if `should_stop` returned true.
        """
        made: list[tuple[Request, Plan | None]] = [(request, None) for request in requests]
        asked = bool(planning.thinking)
        chosen = [i for i, r in enumerate(requests) if can_be_planned(r) and (asked or i not in finished)]
        if asked and len(chosen) < len(requests):
            logger.warning(
                "thinking: only text2music without audio codes, a source or latents can be planned; %d of %d songs "
                "are generated without the planner",
                len(requests) - len(chosen),
                len(requests),
            )
        if not chosen or not self._thinks(planning, sampling):
            return made
        if self.adapters and planning.use_cot_caption is None:
            logger.warning(
                "use_cot_caption: the planner's caption replaces the prompt, but adapters may need the exact prompt; "
                "use_cot_caption=False keeps it"
            )
        if not (codes := codebook_size(self.configs) is not None):
            logger.warning("thinking: this model has no audio tokenizer, so the planner writes only text, no codes")
        planned_requests, joint = [requests[i] for i in chosen], spans_processes(self.mesh)
        if any(request.seed is None for request in planned_requests):  # the plan and the noise of a song share one seed
            fresh = seeds_of(planned_requests, Planning(), joint=joint)
            planned_requests = [
                r if r.seed is not None else dataclasses.replace(r, seed=s)
                for r, s in zip(planned_requests, fresh, strict=True)
            ]
        try:
            with self.on_mesh(), _watched(on_progress) as progress:
                plans = write_plans(
                    self.planner,
                    planned_requests,
                    planning if codes else dataclasses.replace(planning, best_of=1),
                    codes=codes,
                    seeds=None if seeds is None else [seeds[i] for i in chosen],
                    joint=joint,
                    on_progress=progress,
                    should_stop=should_stop,
                )
        except InputError as error:
            if asked:
                raise
            logger.warning("thinking: made without the planner (%s)", error)  # its limit is below the transformer's
            return made
        if not keep:
            self.free_if_needed()
        for i, request, plan in zip(chosen, planned_requests, plans, strict=True):
            made[i] = plan.request(request), plan
        return made


@contextlib.contextmanager
def _watched(on_progress: ProgressCallback | None) -> Iterator[ProgressCallback | None]:
    """Yield a progress callback: `on_progress`, or one that updates a progress bar. Several processes must run the same
    programs, and only one would have a bar, so they have none."""
    if on_progress is not None or jax.process_count() > 1:
        yield on_progress
        return
    with tqdm(unit="code", desc="planning", disable=None) as bar:

        def update(done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.refresh()

        yield None if bar.disable else update


def can_be_planned(request: Request) -> bool:
    """Return whether the planner writes for a request: text2music without audio codes, latents or an edited source."""
    task = tasks.find(request.task_type)
    has_own = request.audio_codes is not None or request.latents is not None
    return task.with_codes is not None and not has_own and not request.flow_edit_morph


def split_planning(keywords: dict[str, Any]) -> tuple[dict[str, Any], Planning]:
    """Split keywords into the values of `Request` fields and a `Planning` of the others.

    Raises:
        InputError: if a name is a field of neither.
    """
    requested, planned, sampled = split(keywords)
    if sampled:
        raise InputError(f"{next(iter(sampled))}: says how a song is sampled; give it to pipe(plan, ...)")
    return requested, Planning(**planned)
