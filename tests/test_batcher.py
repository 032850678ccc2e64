"""The batches of the server: in arrival order, within their budget, each text answered on its own."""

import threading
import weakref

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs `pip install uncausal[serve]`")
from served import wait_for

from uncausal.encoder.serving.batcher import Batcher, ClosedError, QueueFullError


class Held:
    """The batcher's view of an encoder whose forward waits until it is let go."""

    device = "cpu"

    def __init__(self, fail_on=None):
        self.go, self.seen, self.fail_on = threading.Event(), [], fail_on

    def eval(self):
        return self

    def __getitem__(self, index):
        return self

    def collate(self, ids, prompt_length=None):
        return {"ids": ids, "prompt_length": prompt_length}

    def __call__(self, features):
        import torch

        assert self.go.wait(20)
        ids = features["ids"]
        if self.fail_on is not None and any(self.fail_on in row for row in ids):
            raise RuntimeError("bad text")
        self.seen.append([tuple(row) for row in ids])
        return {"sentence_embedding": torch.tensor([[float(sum(row))] for row in ids])}


def test_batches_fill_in_arrival_order_and_drop_who_left():
    model, batches = Held(), []
    batcher = Batcher(model, batch_tokens=4, max_waiting=9, watch=batches.append)  # type: ignore[arg-type]
    first = batcher.submit([[1, 1]])
    wait_for(lambda: batcher.waiting == 0)
    rest = batcher.submit([[2], [3, 3], [4], [5] * 9, [6]])
    rest[1].cancel()
    model.go.set()
    batcher.close()
    assert model.seen == [[(1, 1)], [(2,), (4,)], [(5,) * 9], [(6,)]]
    assert [f.result()[0] for f in (*first, rest[0], *rest[2:])] == [2, 2, 4, 45, 6]
    assert [batch.tokens for batch in batches] == [2, 2, 9, 1]


def test_what_must_run_alone_does():
    model, batches = Held(), []
    batcher = Batcher(model, batch_tokens=99, max_waiting=9, alone=2, watch=batches.append)  # type: ignore[arg-type]
    batcher.submit([[1]])
    wait_for(lambda: batcher.waiting == 0)
    batcher.submit([[2], [3] * 2, [4] * 3, [5], [6] * 4, [7] * 5])
    model.go.set()
    batcher.close()
    assert [batch.tokens for batch in batches] == [1, 3, 3, 1, 4, 5]


def test_full_queue_takes_all_of_a_request_or_none():
    model = Held()
    batcher = Batcher(model, batch_tokens=1, max_waiting=2)  # type: ignore[arg-type]
    batcher.submit([[1]])
    wait_for(lambda: batcher.waiting == 0)
    batcher.submit([[2]])
    with pytest.raises(QueueFullError):
        batcher.submit([[3], [4]])
    assert batcher.waiting == 1 and batcher.seconds_left() >= 1
    model.go.set()
    batcher.close()
    with pytest.raises(ClosedError, match="stopping"):
        batcher.submit([[5]])


def test_leavers_take_no_room():
    model = Held()
    batcher = Batcher(model, batch_tokens=1, max_waiting=2)  # type: ignore[arg-type]
    batcher.submit([[1]])
    wait_for(lambda: batcher.waiting == 0)
    for future in batcher.submit([[2], [3]]):
        future.cancel()
    assert batcher.has_room(2) and not batcher.has_room(3)
    stays = batcher.submit([[4]])
    batcher.tokens_per_second = 0.1
    assert batcher.waiting == 1 and batcher.seconds_left() == 10
    model.go.set()
    batcher.close()
    assert stays[0].result()[0] == 4


def test_one_bad_text_fails_alone():
    model = Held(fail_on=7)
    batcher = Batcher(model, batch_tokens=99, max_waiting=9)  # type: ignore[arg-type]
    held = batcher.submit([[0]])
    wait_for(lambda: batcher.waiting == 0)
    futures = batcher.submit([[1], [2], [7], [3]])
    model.go.set()
    batcher.close()
    assert [f.result()[0] for f in (*held, *futures[:2], futures[3])] == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="bad text"):
        futures[2].result()


def test_what_a_failed_batch_held_is_freed_before_its_halves():
    """An error's traceback holds the batch's tensors, which is what there was no room for."""

    class Full(Held):
        batches, kept = [], []

        def __call__(self, features):
            self.kept.append([held() is not None for held in self.batches])
            batch = np.ones(9)
            self.batches.append(weakref.ref(batch))
            if len(features["ids"]) > 1:
                raise RuntimeError("no room")
            return super().__call__(features)

    model = Full()
    model.go.set()
    batcher = Batcher(model, batch_tokens=9, max_waiting=9)  # type: ignore[arg-type]
    futures = batcher.submit([[1], [2], [3]])
    batcher.close()
    assert [future.result()[0] for future in futures] == [1, 2, 3]
    assert len(model.kept) >= 3 and not any(map(any, model.kept))


def test_a_vector_that_is_not_finite_fails_alone():
    """Regression: JSON's null stood for its numbers."""
    model = Held()
    model.go.set()
    batcher = Batcher(model, batch_tokens=99, max_waiting=9)  # type: ignore[arg-type]
    futures = batcher.submit([[1], [float("nan")], [3]])  # type: ignore[list-item]
    batcher.close()
    assert [futures[0].result()[0], futures[2].result()[0]] == [1, 3]
    with pytest.raises(ValueError, match="not finite"):
        futures[1].result()


def test_prompts_of_one_batch_may_differ():
    model = Held()
    model.go.set()
    batcher = Batcher(model, batch_tokens=99, max_waiting=9)  # type: ignore[arg-type]
    futures = batcher.submit([[1, 2]], prompt_lengths=[1]) + batcher.submit([[3]])
    batcher.close()
    assert [f.result()[0] for f in futures] == [3, 3]
