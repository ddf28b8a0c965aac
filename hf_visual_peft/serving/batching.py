"""Collects images of all requests into batches for the model."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .catalogue import Entry
from .metrics import Metrics
from .pool import AdapterError, Loaded, Pool


log = logging.getLogger("hf_visual_peft.serving")
LOADING = 0.2  # seconds after which a batch starts with the adapters that are loaded


@dataclass(eq=False)
class Item:
    """An image for an adapter, and where its logits go."""

    entry: Entry
    pixels: Tensor
    answer: asyncio.Future[tuple[Loaded, Tensor]]


class Batcher:
    """Runs the model in a thread of its own, on as many waiting images as fit together.

    Args:
        pool: of adapters.
        metrics: to count in.
        max_batch: images in a batch.
        max_wait: seconds that an image waits for others.
    """

    def __init__(self, pool: Pool, metrics: Metrics, max_batch: int, max_wait: float) -> None:
        self.pool, self.metrics, self.max_batch, self.max_wait = pool, metrics, max_batch, max_wait
        self.waiting: deque[Item] = deque()
        self.more = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self.closing = False

    def add(self, entry: Entry, pixels: Tensor) -> asyncio.Future[tuple[Loaded, Tensor]]:
        """Queue an image; the result has the adapter and its logits."""
        answer: asyncio.Future[tuple[Loaded, Tensor]] = asyncio.get_running_loop().create_future()
        self.waiting.append(Item(entry, pixels, answer))
        self.more.set()
        return answer

    async def run(self) -> None:
        """Work until `close` was called and nothing waits."""
        while True:
            await self.more.wait()
            self.more.clear()
            if self.waiting and len(self.waiting) < self.max_batch and not self.closing:
                await asyncio.sleep(self.max_wait)
            while self.waiting:
                await self._step()
            if self.closing:
                self.thread.shutdown()
                return

    def close(self) -> None:
        """Finish what waits, and end."""
        self.closing = True
        self.more.set()

    async def _step(self) -> None:
        """Load what the oldest images need, then run those that fit with the oldest one."""
        loop = asyncio.get_running_loop()
        self.waiting = deque(item for item in self.waiting if not item.answer.done())  # others gave up
        oldest = list(self.waiting)[: self.max_batch]
        entries = {item.entry.name: item for item in oldest}
        names = list(entries)[: self.pool.most]
        before = loop.time()
        for name in names:
            if loop.time() - before > LOADING:  # the first one is there; the others wait for the next batch
                break
            try:
                await loop.run_in_executor(
                    self.thread, self.pool.get, entries[name].entry, entries[name].pixels.shape, names
                )
            except Exception as error:  # of one adapter; the server goes on
                log.warning("%s", error)
                self._fail([item for item in self.waiting if item.entry.name == name], error)
        self.metrics.pool(self.pool)
        usable = [item for item in self.waiting if item.entry.name in self.pool.loaded]
        if not usable:
            return
        keys = [self.pool.loaded[item.entry.name].batch_key(item.pixels.shape) for item in usable]
        batch = [item for item, key in zip(usable, keys, strict=True) if key == keys[0]][: self.max_batch]
        taken = {id(item) for item in batch}
        self.waiting = deque(item for item in self.waiting if id(item) not in taken)
        await loop.run_in_executor(self.thread, self._forward, batch, loop)

    def _forward(self, batch: list[Item], loop: asyncio.AbstractEventLoop) -> None:
        """Run a batch in the model's thread; if it fails as a whole, each adapter by itself."""
        loaded = [self.pool.get(item.entry, item.pixels.shape) for item in batch]
        pixels = torch.stack([item.pixels for item in batch])
        self.metrics.batch.observe(len(batch))
        try:
            answers: list[Any] = list(self.pool.run(loaded, pixels))
        except Exception as error:  # of any method
            if len({one.entry.key for one in loaded}) == 1:
                log.exception("The adapter %s failed", loaded[0].entry.name)
                answers = [AdapterError(f"The adapter {loaded[0].entry.name} failed: {error}")] * len(batch)
            else:
                self._part(batch, loaded, error, loop)
                return
        for item, one, answer in zip(batch, loaded, answers, strict=True):
            if isinstance(answer, Tensor) and not answer.isfinite().all():
                answer = AdapterError(f"The adapter {item.entry.name} gives logits that are not finite.")
            loop.call_soon_threadsafe(_settle, item, one, answer)

    def _part(
        self, batch: list[Item], loaded: list[Loaded], error: Exception, loop: asyncio.AbstractEventLoop
    ) -> None:
        log.warning("Adapters of %s do not mix in a batch: %s", loaded[0].group.kind, error)
        for one in loaded:
            one.alone = f"the model cannot mix adapters here: {error}"
        for key in dict.fromkeys(one.entry.key for one in loaded):
            self._forward([item for item in batch if item.entry.key == key], loop)

    def _fail(self, items: list[Item], error: Exception) -> None:
        failed = {id(item) for item in items}
        self.waiting = deque(item for item in self.waiting if id(item) not in failed)
        for item in items:
            if not item.answer.done():
                item.answer.set_exception(error)


def _settle(item: Item, loaded: Loaded, answer: Tensor | Exception) -> None:
    if item.answer.done():  # the request has timed out
        return
    if isinstance(answer, Exception):
        item.answer.set_exception(answer)
    else:
        item.answer.set_result((loaded, answer))
