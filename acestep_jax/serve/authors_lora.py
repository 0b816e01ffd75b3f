"""The adapters of the authors' API: what is loaded, scaled and switched off, for all its clients."""

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, HTTPException, Request

from acestep_jax.serve.envelope import envelope
from acestep_jax.serve.lenient import Fields

if TYPE_CHECKING:
    from acestep_jax.serve.authors import Authors


def add(routes: APIRouter, api: "Authors") -> None:
    """Add the routes of adapters, which are those of --lora, by name."""

    @routes.post("/v1/lora/load", summary="Use an adapter")
    async def load(request: Request) -> dict[str, Any]:
        values = (await api.body(request)).values
        name = str(values.get("adapter_name") or values.get("lora_path") or "")
        path = str(values.get("lora_path") or name)
        name = path if path in api.service.engine.adapters else name
        if name not in api.service.engine.adapters:
            known = ", ".join(api.service.engine.adapters) or "none"
            raise HTTPException(400, f"lora_path: paths are not opened; name an adapter of the server: {known}")
        api.scales[name] = 1.0
        return envelope(dict(message=f"{name} is used", lora_path=path, adapter_name=name))

    @routes.post("/v1/lora/unload", summary="Use no adapter")
    async def unload(request: Request) -> dict[str, Any]:
        await api.body(request)
        api.scales.clear()
        return envelope(dict(message="no adapter is used"))

    @routes.post("/v1/lora/toggle", summary="Switch adapters on and off")
    async def toggle(request: Request) -> dict[str, Any]:
        api.use_lora = Fields((await api.body(request)).values).flag("use_lora")
        return envelope(dict(message=f"adapters are {'on' if api.use_lora else 'off'}", use_lora=api.use_lora))

    @routes.post("/v1/lora/scale", summary="Scale adapters")
    async def scale(request: Request) -> dict[str, Any]:
        fields = Fields((await api.body(request)).values)
        value, name = fields.number("scale"), fields.text("adapter_name")
        if value is None or not 0 <= value <= 2:
            return envelope(None, 400, "scale: expected 0 to 2")
        names = [name] if name else list(api.scales)
        if not names or any(one not in api.scales for one in names):
            return envelope(None, 400, "no such adapter is loaded")
        api.scales |= dict.fromkeys(names, value)
        return envelope(dict(message=f"scale {value:g}", scale=value, adapter_name=name or names[0]))

    @routes.get("/v1/lora/status", summary="Adapters in use")
    async def status() -> dict[str, Any]:
        first = next(iter(api.scales), None)
        return envelope(
            dict(
                lora_loaded=bool(api.scales),
                use_lora=bool(api.scales) and api.use_lora,
                lora_scale=api.scales.get(first, 1.0) if first else 1.0,
                adapter_type="lora" if first else None,
                scales=dict(api.scales),
                active_adapter=first,
                adapters=list(api.scales),
                synthetic_default_mode=False,
            )
        )
