"""What a server does with a request, apart from HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .batching import Batcher
from .catalogue import Base, Entry, as_json, find_adapters
from .errors import RequestError
from .images import Processors, decoded, pixels_of
from .metrics import Metrics
from .options import ServeOptions
from .pool import AdapterError, Backbone, Loaded, Pool


DECODERS = 4  # images that are decoded at a time


class Service:
    """A backbone, its adapters, and the queue before them.

    Args:
        options: of the server.

    Raises:
        ValueError: the backbone cannot be loaded, or no adapter can be served.
    """

    def __init__(self, options: ServeOptions) -> None:
        self.options, self.metrics = options, Metrics()
        base = Base(options.model, options.revision, options.any_base)
        self.entries = find_adapters(options.adapters, base)
        self.processors = Processors(base)
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.pool = Pool(Backbone(base, device, getattr(torch, options.dtype)), options.max_adapters)
        self.batcher: Batcher
        self.work: asyncio.Task[None]
        self.hands: ThreadPoolExecutor
        self.active = 0
        self.closing = False

    async def start(self) -> None:
        """Begin to work, in the running loop."""
        self.batcher = Batcher(self.pool, self.metrics, self.options.max_batch, self.options.max_wait_ms / 1000)
        self.hands = ThreadPoolExecutor(DECODERS, thread_name_prefix="images")
        self.work = asyncio.create_task(self.batcher.run())

    async def stop(self) -> None:
        """Finish what was admitted, and end."""
        self.closing = True
        self.batcher.close()
        await self.work
        self.hands.shutdown()

    def admit(self, count: int) -> None:
        """Take a request of so many predictions.

        Raises:
            RequestError: too many wait already, or the server is about to end.
        """
        if self.closing:
            raise RequestError(503, "closing", "The server is shutting down.", {"Retry-After": "1"})
        if self.active + count > self.options.max_queue:
            raise RequestError(
                429,
                "queue_full",
                f"{self.active} predictions wait or run and at most {self.options.max_queue} may: try again later.",
                {"Retry-After": "1"},
            )
        self.active += count
        self.metrics.active.set(self.active)

    def leave(self, count: int) -> None:
        """Give back the places of a request."""
        self.active -= count
        self.metrics.active.set(self.active)

    def find(self, names: Sequence[str]) -> list[Entry]:
        """The adapters that a request names.

        Raises:
            RequestError: there are none, too many, unknown ones, or such of another backbone.
        """
        usable = [entry for entry in self.entries.values() if not entry.refused]
        if not names and len(usable) == 1:
            return usable
        if not names:
            raise RequestError(422, "no_adapter", "Name an adapter: ?adapter=NAME; GET /v1/adapters lists them.")
        if len(set(names)) > self.options.max_adapters_per_request:
            most = self.options.max_adapters_per_request
            raise RequestError(
                422, "too_many_adapters", f"{len(set(names))} adapters are named, at most {most} may be."
            )
        found = []
        for name in dict.fromkeys(names):
            entry = self.entries.get(name)
            if entry is None:
                raise RequestError(
                    404, "unknown_adapter", f"There is no adapter {name[:100]!r}; GET /v1/adapters lists them."
                )
            if entry.refused:
                raise RequestError(
                    409, "refused_adapter", f"The adapter {entry.name} cannot be served: {entry.refused}."
                )
            found.append(entry)
        return found

    async def predict(self, entries: Sequence[Entry], content: bytes, top_k: int) -> list[dict[str, Any]]:
        """The classes that each adapter sees in an image.

        Raises:
            RequestError: the image cannot be used, or an adapter fails.
        """
        loop = asyncio.get_running_loop()
        prepared = await loop.run_in_executor(self.hands, self._prepare, entries, content)
        answers = [self.batcher.add(entry, pixels) for entry, pixels in zip(entries, prepared, strict=True)]
        try:
            found = await asyncio.gather(*answers)
        except AdapterError as error:
            raise RequestError(503, "adapter_failed", str(error)) from error
        finally:
            for answer in answers:
                if not answer.done():
                    answer.cancel()
                elif not answer.cancelled():
                    answer.exception()  # was seen: of several only the first is told
        for entry in entries:
            self.metrics.images.labels(entry.name).inc()
        return [ranked(one, logits, top_k) for one, logits in found]

    def adapters(self) -> list[dict[str, object]]:
        """All adapters, for people and programs."""
        loaded = {name: one.alone for name, one in list(self.pool.loaded.items())}
        return [as_json(entry, loaded) for entry in self.entries.values()]

    def _prepare(self, entries: Sequence[Entry], content: bytes) -> list[Tensor]:
        image = decoded(content, self.options.max_pixels)
        known: dict[int, Tensor] = {}
        found = []
        for entry in entries:
            try:
                entry.fetch()
                processor = self.processors.of(entry)
                if id(processor) not in known:
                    known[id(processor)] = pixels_of(image, processor)
            except Exception as error:  # of files and image processors of others
                raise RequestError(
                    503, "adapter_failed", f"The adapter {entry.name} cannot take the image: {error}"
                ) from error
            found.append(known[id(processor)])
        return found


def ranked(one: Loaded, logits: Tensor, top_k: int) -> dict[str, Any]:
    """The most probable classes, in order.

    Args:
        one: the adapter.
        logits: of an image.
        top_k: how many classes.
    """
    chances = logits.sigmoid() if one.several else logits.softmax(-1)
    values, places = chances.topk(min(top_k, len(chances)))
    return {
        "adapter": one.entry.name,
        "multi_label": one.several,
        "predictions": [
            {"label": one.classes[place], "probability": value}
            for place, value in zip(places.tolist(), values.tolist(), strict=True)
        ],
    }
