"""What the launchers share."""

import torch

from svg2_compile.kernels.launch import is_capturing, rows_of_unit_stride


def test_capturing_is_asked_of_the_current_stream_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert is_capturing()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not is_capturing()


def test_only_rows_whose_elements_are_no_neighbours_are_copied():
    x = torch.randn(1, 3, 2, 4)
    for plain in (x, x.transpose(1, 2), x[:, ::2], x.expand(2, -1, -1, -1)):
        assert rows_of_unit_stride(plain) is plain
    for strided in (x.mT, x[..., ::2]):
        copy = rows_of_unit_stride(strided)
        assert copy.stride(-1) == 1 and torch.equal(copy, strided)
