import os
import threading
from functools import partial

import pytest
import torch
from conftest import small_model, torch_threads

from emoshare.threads_emoshare import side_by_side


@pytest.fixture(autouse=True)
def _two_threads():
    with torch_threads(2):
        yield


def test_results_come_in_order_from_as_many_threads_as_asked_for():
    barrier = threading.Barrier(2, timeout=30)

    def task(number):
        barrier.wait()  # passes only if two tasks run at the same time
        return number, threading.get_ident(), torch.get_num_threads()

    results = side_by_side([partial(task, number) for number in range(6)])
    assert [number for number, _, _ in results] == list(range(6))
    assert len({thread for _, thread, _ in results}) == 2
    assert {threads for _, _, threads in results} == {1}
    assert torch.get_num_threads() == 2


def test_threads_that_start_later_have_the_default_number_of_threads():
    side_by_side([lambda: None] * 4)
    seen = []

    def work():
        torch.ones(100_000).sum()  # a thread takes the default with its first parallel operator
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [2]


def test_one_thread_is_the_callers_own():
    assert side_by_side([threading.get_ident] * 3, num_threads=1) == [threading.get_ident()] * 3
    assert side_by_side([threading.get_ident]) == [threading.get_ident()]


def test_an_error_in_a_task_is_raised():
    def fail():
        raise ValueError("no such head")

    with pytest.raises(ValueError, match="no such head"):
        side_by_side([lambda: 1, fail, lambda: 2])
    assert side_by_side([lambda: 1, lambda: 2]) == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    side_by_side([lambda: None] * 4)
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.write(write, str(side_by_side([lambda: 1, lambda: 2])).encode())
        os._exit(0)
    os.close(write)
    assert os.read(read, 100) == b"[1, 2]"
    os.waitpid(process, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_heads_side_by_side_give_the_same_shares(mode):
    model, features = small_model(), torch.randn(3, 30, 40)
    with torch.enable_grad():
        expected = model(input_features=features)  # with gradients, one head after another
    assert expected.logits.requires_grad
    with mode():
        shares = model(input_features=features, output_attentions=True)
        assert shares.logits.is_inference() == (mode is torch.inference_mode)
    assert not shares.logits.requires_grad
    torch.testing.assert_close(shares.logits, expected.logits.detach(), atol=1e-6, rtol=0)
    assert shares.attentions.shape == (3, 9, 15)
