"""A server over loopback HTTP, with a model that computes nothing."""

import contextlib
import importlib.util
import threading

import pytest

from acestep_jax.serve.local import LocalEngine
from acestep_jax.serve.service import Service
from acestep_jax.serve.store import Store
from acestep_jax.serve.submission import Limits
from tests.processes import free_port
from tests.serve.fake import FakePipeline, model, wait_until

NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "httpx")
KEY = "opensesame"


@pytest.fixture
def service(tmp_path):
    """Return a function that makes a service in a folder, with a fake pipeline; all of them are closed."""
    with contextlib.ExitStack() as stack:

        def make(pipe=None, folder=None, limits=None, started=True, engine=None, planner=None, **options):
            own = {name: options.pop(name) for name in ("strict", "inputs") if name in options}
            pipe = pipe or FakePipeline()
            store = Store(folder or tmp_path / "data")
            engine = engine or LocalEngine([model(pipe, planner=planner), model(pipe, "other")], **options)
            made = Service(store, engine, limits or Limits(), **own)
            made.pipe = pipe
            stack.callback(store.close)
            stack.callback(made.close, 0)
            if started:
                made.start()
            return made

        yield make


@contextlib.contextmanager
def serving(service, *, key=None, **options):
    """Serve a service on a port of this machine; yield an `httpx.Client`."""
    import httpx
    import uvicorn

    from acestep_jax.serve.app import create, settings
    from acestep_jax.serve.security import Keys

    app = create(service, Keys(key, service.store.secret()), version="test", **options)
    port = free_port()
    server = uvicorn.Server(settings(app, "127.0.0.1", port, log_level="error", shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, headers=headers) as client:
            client.app = app
            yield client
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def http(service):
    """Return a function that starts a server and returns its client; arguments of `service` and `serving`."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'acestep-jax[serve]' httpx")
    with contextlib.ExitStack() as stack:

        def make(*, key=None, hosts=(), origins=(), static=None, **options):
            made = service(**options)
            client = stack.enter_context(serving(made, key=key, hosts=hosts, origins=origins, static=static))
            client.service = made
            return client

        yield make


@pytest.fixture
def finished():
    """Return a function that waits until a record has ended, and returns it as the server shows it."""

    def wait(client, record_id):
        wait_until(lambda: client.get(f"/v1/songs/{record_id}").json()["status"] in ("done", "failed", "cancelled"))
        return client.get(f"/v1/songs/{record_id}").json()

    return wait
