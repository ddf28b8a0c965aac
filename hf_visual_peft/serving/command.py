"""Runs the server."""

from __future__ import annotations

import os
import sys
import tempfile
import types

from .options import TOKEN_VARIABLE, ServeOptions


BACKLOG = 200  # connections beyond those of the queue, which get to know that it is full

HUNG = 30  # seconds without an answer to uvicorn, after which a worker is replaced


def run(options: ServeOptions) -> int:
    """Serve until a signal; return the exit status.

    Raises:
        ModuleNotFoundError: the extra `serve` is not installed.
        ValueError: the backbone cannot be loaded, or no adapter can be served.
    """
    shared = None
    if options.workers > 1:
        shared = tempfile.TemporaryDirectory(prefix="hf-visual-peft-")
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = shared.name  # before prometheus_client is imported
    try:
        import uvicorn

        from .app import OPTIONS_VARIABLE, create_app
        from .service import Service
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"serve needs the extra 'serve': pip install 'hf-visual-peft[serve]' ({error})"
        ) from error
    settings = {
        "host": options.host,
        "port": options.port,
        "limit_concurrency": options.max_queue + BACKLOG,
        "timeout_keep_alive": 10,
        "timeout_graceful_shutdown": int(options.timeout) + 1,
        "server_header": False,
    }
    if options.workers == 1:
        service = Service(options)
        for entry in service.entries.values():
            if entry.refused:
                print(f"{entry.name} ({entry.source}) is refused: {entry.refused}.", flush=True)
        server = uvicorn.Server(uvicorn.Config(create_app(service), **settings))  # type: ignore[arg-type]
        server.run()
        return 0 if server.started else 1
    settings["timeout_worker_healthcheck"] = HUNG
    os.environ[OPTIONS_VARIABLE] = options.as_json()
    if token := options.token():
        os.environ[TOKEN_VARIABLE] = token
    main = sys.modules["__main__"]
    # a worker would import it with all of torch before it answers uvicorn, and seem to hang
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        uvicorn.run(
            "hf_visual_peft.serving.app:from_environment",
            factory=True,
            workers=options.workers,
            **settings,  # type: ignore[arg-type]
        )
    finally:
        sys.modules["__main__"] = main
        del os.environ[OPTIONS_VARIABLE]
        if shared is not None:
            shared.cleanup()
    return 0
