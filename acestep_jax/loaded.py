"""A model in memory: its networks and tokenizer, their placement, its adapters, and loading and saving."""

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
from jax.sharding import Mesh
from tokenizers import Tokenizer

from acestep_jax.arguments import unknown_name
from acestep_jax.errors import InputError
from acestep_jax.inputs.settings import defaults_of
from acestep_jax.inputs.sources import SilentTimbre
from acestep_jax.io import checkpoint, sharing
from acestep_jax.io.adapter import Adapter, LoadedAdapters, scales_by_name
from acestep_jax.io.files import as_path
from acestep_jax.io.manifest import pick_dtype
from acestep_jax.io.native import native_folder
from acestep_jax.io.planner_source import PlannerSource
from acestep_jax.memory import needed_bytes, weight_bytes
from acestep_jax.models.audio_tokenizer import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from acestep_jax.models.autoencoder import AutoencoderOobleck
from acestep_jax.models.condition_encoder import AceStepConditionEncoder
from acestep_jax.models.qwen3 import Qwen3Model
from acestep_jax.models.registry import FAMILY, SamplingDefaults
from acestep_jax.models.runtime import MIXED, split_dtype
from acestep_jax.models.transformer import AceStepTransformer1DModel
from acestep_jax.placement import Placement, choose
from acestep_jax.request import Sampling
from acestep_jax.settings import own_settings, with_own_settings


class LoadedModel:
    """The networks of a checkpoint, and the adapters and the planner that belong to them.

    Args:
        transformer, condition_encoder, text_encoder, vae, audio_tokenizer, audio_token_detokenizer: the networks; None
            for those that are not needed. A method that needs one of these raises InputError.
        tokenizer: tokenizer of the text encoder.
        mesh: the device mesh that holds the networks; None: one device.
        placement: whether networks stay on the host until they are used, see `acestep_jax.placement`.
        sampling_defaults: defaults of this checkpoint, which override those of its variant in `models.registry`.
    """

    def __init__(
        self,
        transformer: AceStepTransformer1DModel | None = None,
        condition_encoder: AceStepConditionEncoder | None = None,
        text_encoder: Qwen3Model | None = None,
        vae: AutoencoderOobleck | None = None,
        tokenizer: Tokenizer | None = None,
        audio_tokenizer: AceStepAudioTokenizer | None = None,
        audio_token_detokenizer: AceStepAudioTokenDetokenizer | None = None,
        mesh: Mesh | None = None,
        sampling_defaults: Mapping[str, Any] | None = None,
        placement: Placement | None = None,
    ):
        self.placement = placement or Placement()
        self.transformer = transformer
        self.condition_encoder = condition_encoder
        self.text_encoder = text_encoder
        self.vae = vae
        self.tokenizer = tokenizer
        self.audio_tokenizer = audio_tokenizer
        self.audio_token_detokenizer = audio_token_detokenizer
        self.mesh = mesh
        self.sampling_defaults = dict(sampling_defaults or {})
        self.loaded_from: Path | None = None  # the native checkpoint, if there is one
        self.planner_source: PlannerSource | None = None
        self.silent_timbre = SilentTimbre()

    @classmethod
    @with_own_settings
    def from_pretrained(
        cls,
        source: str | Path = checkpoint.SMALL_MODEL,
        variant: str | None = None,
        *,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        networks: Sequence[str] | None = None,
        offload: bool | None = None,
        planner: str | Path | None = None,
        **unknown: Any,
    ) -> Self:
        """Load a model. If necessary it is first downloaded and converted; both results are kept.

        Args:
            source: the id of a repository on the Hugging Face hub, such as "ACE-Step/Ace-Step1.5"; a PyTorch
                checkpoint: a folder in ACE-Step's or diffusers' layout, or a file of ComfyUI; or the folder of a native
                checkpoint. By default the small model of this package.
            variant: "turbo", "base", "sft", "xl-turbo", ..., where the source has several.
            dtype: dtype of weights and computation, "float32", "bfloat16", "float16" or "mixed_float16", see
                `Runtime.of`; None: the checkpoint's own, or else the best for the device. "int8" and "fp8" quantise the
                weights of layers, see `models.quantization`; everything else is then as for None.
            mesh: from `acestep_jax.make_mesh`; None: the first device.
            revision: branch, tag or commit of the repository; None: its main branch.
            token: access token of the hub, for private and gated repositories; None: the one of `hf auth login` or
                HF_TOKEN.
            cache_dir: folder for downloads and converted weights; None: the hub's cache, and acestep-jax/models in the
                user's cache folder.
            local_files_only: whether to use only files that are already on this machine.
            networks: names of the networks to load; None: all.
            offload: whether to keep networks in the host's memory except while they are used; None: only if the device
                has too little memory for all of them and a song of ten minutes. Not with a mesh.
            planner: the language model that plans songs: a folder, or the id of a repository such as
                "ACE-Step/acestep-5Hz-lm-0.6B"; None: the model's own. It is loaded on first use.

        Raises:
            InputError: if the model cannot be found, downloaded or read, or an argument is unknown.
        """
        for name in unknown:
            raise InputError(unknown_name(name, inspect.signature(cls.from_pretrained).parameters.keys() - {"unknown"}))
        hub = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        path = native_folder(source, variant, dtype=converted_dtype(dtype), **hub)
        manifest = checkpoint.read_manifest(path, None if networks is None else networks)
        precision, quantization = split_dtype(dtype)
        precision = pick_dtype(manifest, mesh) if precision is None else precision
        configs = {name: c for name, c in manifest.configs.items() if networks is None or name in networks}
        counted = precision or manifest.dtypes.get("transformer", "float32")
        kind = quantization or manifest.quantization.get("transformer")
        needed = needed_bytes(configs, counted, jax.default_backend(), quantization=kind)
        weights = weight_bytes(configs, counted, kind)
        placement = choose(needed, offload, mesh, weights.get("transformer", 0))
        loaded: dict[str, Any] = checkpoint.load(
            path,
            dtype=precision,
            quantization=quantization,
            mesh=mesh,
            names=networks,
            on_host=placement.offloads,
        )
        tokenizer = checkpoint.load_tokenizer(path) if "text_encoder" in loaded else None
        pipe = cls(**loaded, tokenizer=tokenizer, mesh=mesh, sampling_defaults=manifest.sampling, placement=placement)
        pipe.loaded_from = path
        pipe.planner_source = PlannerSource.of(planner, source, path, dtype=quantization or precision, **hub)
        return pipe

    from_checkpoint = from_pretrained

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as a native checkpoint with a model card. Arrays keep the dtype that they have in memory.

        Args:
            folder: must not exist yet.

        Raises:
            InputError: if it exists, the disk has no room, a network was not loaded, or an adapter is active.
        """
        self._save(as_path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the files of `save_pretrained` to the Hugging Face hub; return the URL of the commit.

        Args:
            repo_id: OWNER/NAME; created if it does not exist.
            token: access token with write permission; None: the one of `hf auth login` or HF_TOKEN.
            private: whether a new repository is private; None: as in the owner's settings.
            commit_message: None: "Upload with acestep-jax".

        Raises:
            InputError: see `save_pretrained`; or if the hub rejects the upload or cannot be reached.
        """
        from acestep_jax.io import hub

        sharing.check_networks(self.networks, self.tokenizer, self.adapters)  # before a repository is created
        return hub.push_to_hub(
            repo_id,
            functools.partial(self._save, name=repo_id),
            token=token,
            private=private,
            commit_message=commit_message,
        )

    def _save(self, folder: Path, name: str | None = None) -> None:
        networks = self.networks
        if "transformer" in networks:
            networks["transformer"] = self._loaded.base
        sharing.save_pretrained(
            folder,
            networks,
            self.tokenizer,
            scales=self.adapters,
            sampling=self.sampling_defaults,
            loaded_from=self.loaded_from,
            name=name,
        )

    @property
    def transformer(self) -> AceStepTransformer1DModel | None:
        """The diffusion transformer with the loaded adapters. Assigning another transformer discards the adapters."""
        return self._loaded.network

    @transformer.setter
    def transformer(self, network: AceStepTransformer1DModel | None) -> None:
        self.placement.forget()
        self._loaded = LoadedAdapters.none(network)

    @property
    def adapters(self) -> Mapping[str, float]:
        """The scale of each loaded adapter, by name; 0 turns it off. Read-only, see `set_adapters`."""
        return self._loaded.scales

    def load_lora(
        self,
        adapters: str | Path | Adapter | Sequence[str | Path | Adapter],
        scale: float | Sequence[float] = 1.0,
        *,
        name: str | Sequence[str] | None = None,
    ) -> None:
        """Load LoRA or DoRA adapters in addition to those that are loaded; their changes to the weights add up.

        Args:
            adapters: a folder that training wrote, a folder or .safetensors file of PyTorch, the result of
                `load_adapter`, or a list of these.
            scale: 1 applies the adapter as trained, 0 turns it off; one value for all adapters or one for each.
            name: one for each adapter; None: the name of its folder, followed by -2, -3, ... if that name is taken.

        Raises:
            InputError: if there is no adapter, it is damaged or for another model, a scale is not a finite number, a
                name is taken, or the model was loaded without a transformer.
        """
        self.need("transformer")
        with self.on_mesh():
            self._loaded = self._loaded.load(adapters, scale, name)

    def load_lora_weights(
        self,
        adapter: str | Path,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Load an adapter at scale 1, from this machine or the Hugging Face hub: diffusers' name for `load_lora`.

        Args:
            adapter: a folder, a file, the id of a repository, or OWNER/NAME/FILE.safetensors.
            adapter_name: name for `set_adapters`; None: the name of the folder, file or repository.
            weight_name: the file to use if a folder or repository holds several adapters.
            revision, token, cache_dir, local_files_only: of the hub, see `from_pretrained`.

        Raises:
            InputError: see `load_lora`; or if the adapter cannot be found or downloaded.
        """
        path = as_path(adapter).expanduser()
        if path.exists():
            path = path / weight_name if weight_name else path
        else:
            from acestep_jax.io import hub

            path = hub.locate_adapter(
                str(adapter),
                weight_name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
            adapter_name = adapter_name or str(adapter).rpartition("/")[2].removesuffix(".safetensors")
        self.load_lora(path, name=adapter_name)

    def set_adapters(
        self,
        scales: Mapping[str, float] | str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Set the scales of loaded adapters, without compiling anything; adapters that are not named are turned off.

        Args:
            scales: scale by name; or, as in diffusers, a name or a list of names.
            adapter_weights: with names, one scale for all or one for each; None: 1.

        Raises:
            InputError: if a name is unknown, or a scale is not a finite number.
        """
        with self.on_mesh():
            self._loaded = self._loaded.set(scales_by_name(scales, adapter_weights))

    def unload_lora(self, names: str | Iterable[str] | None = None) -> None:
        """Remove adapters, all of them by default, and restore the weights, bit for bit.

        Raises:
            InputError: if a name is unknown.
        """
        with self.on_mesh():
            self._loaded = self._loaded.unload(names)

    def unload_lora_weights(self) -> None:
        """Remove all adapters: diffusers' name for `unload_lora`."""
        self.unload_lora()

    @property
    def networks(self) -> dict[str, Any]:
        """The networks that are loaded, by name."""
        found = {name: getattr(self, name) for name in FAMILY.networks}
        return {name: network for name, network in found.items() if network is not None}

    @property
    def configs(self) -> dict[str, Any]:
        """The architectures of the networks that are loaded, by name."""
        return {name: network.config for name, network in self.networks.items()}

    @property
    def sample_rate(self) -> int:
        """Sample rate of songs, in Hz."""
        return self.need("vae").config.sampling_rate

    @property
    def latents_per_second(self) -> float:
        """Number of latent frames per second."""
        return self.sample_rate / self.need("vae").hop_length

    @property
    def defaults(self) -> SamplingDefaults:
        """Defaults for unset fields of `Sampling`: the checkpoint's own, or else the variant's."""
        return defaults_of(Sampling(), self.need("transformer").config, self.sampling_defaults)

    def need(self, name: str) -> Any:
        """Return a network or the tokenizer; raise InputError if the model was loaded without it."""
        found = getattr(self, name)
        if found is None:
            raise InputError(f"the pipeline was loaded without {name}; load it with this network")
        return found

    @contextlib.contextmanager
    def on_mesh(self) -> Iterator[None]:
        """Activate the mesh of this model, and this library's settings of JAX."""
        with own_settings(), contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            yield


def converted_dtype(dtype: str | None) -> str | None:
    """Return the dtype of stored weights after conversion, for the dtype given by the user; None: unchanged.

    Mixed precision does not change the stored weights: they are rounded when they are loaded.
    """
    precision, quantization = split_dtype(dtype)
    return quantization if precision in (None, MIXED) else precision
