"""Integer ranges, packing, tensors with a scale."""

import re

import pytest
import torch

from vitq.formats import ActivationFormat, QTensor, int_range, pack_int4, unpack_int4


@pytest.mark.parametrize(("bits", "signed", "expected"), [(8, True, (-128, 127)), (8, False, (0, 255)), (4, True, (-8, 7)), (2, True, (-2, 1)), (2, False, (0, 3))])
def test_int_range(bits, signed, expected):
    assert int_range(bits, signed) == expected


@pytest.mark.parametrize("bits", [1, 9, 16, 0, True, 8.0, "8"])
def test_int_range_refuses(bits):
    with pytest.raises(ValueError, match=re.escape(f"bits = {bits!r}: a quantized format has 2 to 8 bits")):
        int_range(bits)


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (3, 5), (2, 3, 8), (4, 0), (0, 5)])
def test_int4_round_trip(shape):
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    assert torch.equal(unpack_int4(packed, shape[-1]), codes)


def test_int4_every_pair_and_layout():
    pairs = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    packed = pack_int4(pairs)
    assert torch.equal(unpack_int4(packed, 2), pairs)
    # low nibble first; an odd tail is padded with 0
    assert pack_int4(torch.tensor([1, -1, -8], dtype=torch.int8)).tolist() == [0xF1, 0x08]


def test_int4_not_contiguous():
    codes = torch.randint(-8, 8, (6, 9), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes.t()), 6), codes.t())
    assert torch.equal(pack_int4(codes[:, ::2]), pack_int4(codes[:, ::2].contiguous()))


def test_int4_refuses():
    with pytest.raises(ValueError, match=re.escape("codes are in -9..0; int4 holds -8..7")):
        pack_int4(torch.tensor([-9, 0], dtype=torch.int8))
    with pytest.raises(TypeError, match="torch.int8"):
        pack_int4(torch.zeros(2))
    with pytest.raises(TypeError, match="torch.uint8"):
        unpack_int4(torch.zeros(2, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match=re.escape("5 codes need a last dimension of 3")):
        unpack_int4(torch.zeros(2, dtype=torch.uint8), 5)


def test_qtensor_signed_and_unsigned_agree():
    codes = torch.randint(-128, 128, (4, 6), dtype=torch.int8)
    scale = torch.rand(4, 1)
    signed = QTensor(codes, scale, -3)
    unsigned = QTensor((codes.int() + 128).to(torch.uint8), scale, 125)
    assert torch.equal(signed.dequantize(), unsigned.dequantize())
    assert torch.equal(signed.dequantize(), (codes.float() + 3) * scale)
    assert signed.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert signed.shape == (4, 6) and signed.device == codes.device


def test_qtensor_refuses():
    codes = torch.zeros(4, 6, dtype=torch.int8)
    with pytest.raises(ValueError, match=re.escape("scale of shape (4,) does not broadcast to codes of shape (4, 6)")):
        QTensor(codes, torch.ones(4))
    with pytest.raises(ValueError, match="does not broadcast"):
        QTensor(codes, torch.ones(2, 4, 6))
    with pytest.raises(TypeError, match="scale is torch.float16"):
        QTensor(codes, torch.ones((), dtype=torch.float16))
    with pytest.raises(TypeError, match="codes are torch.int32"):
        QTensor(codes.int(), torch.ones(()))


def test_activation_format():
    form = ActivationFormat(4, scale=0.5, zero_point=torch.tensor(-3))
    assert (form.qmin, form.qmax) == (-8, 7)
    assert form.scale.dtype == torch.float32 and form.scale.shape == ()
    assert form.zero_point.dtype == torch.int32 and int(form.zero_point) == -3
    assert ActivationFormat(8, scale=torch.tensor([0.1])).zero_point == 0
    assert ActivationFormat(8, dynamic=True).scale is None
    each = ActivationFormat(4, scale=torch.tensor([1.0, 2.0]), zero_point=3)  # one a head
    assert each.scale.tolist() == [1.0, 2.0] and each.zero_point.tolist() == [3, 3]
    assert ActivationFormat(8, dynamic=True, signed=False).qmax == 255


@pytest.mark.parametrize(("given", "message"), [
    ({"bits": 8}, "a static format needs a scale"),
    ({"bits": 8, "dynamic": True, "scale": 1.0}, "leave scale and zero_point out"),
    ({"bits": 8, "scale": torch.ones(2), "zero_point": torch.zeros(3, dtype=torch.int32)}, "static formats have one of each, or one a head"),
    ({"bits": 8, "scale": torch.ones(2, 3)}, "static formats have one of each, or one a head"),
    ({"bits": 8, "scale": torch.tensor([1.0, 0.0])}, "finite and above 0"),
    ({"bits": 4, "scale": torch.ones(2), "zero_point": torch.tensor([0, 9])}, "zero_point = [0, 9]; 4 bits allow -8..7"),
    ({"bits": 8, "scale": float("nan")}, "finite and above 0"),
    ({"bits": 8, "scale": 0.0}, "finite and above 0"),
    ({"bits": 4, "scale": 1.0, "zero_point": 8}, "zero_point = 8; 4 bits allow -8..7"),
    ({"bits": 16, "scale": 1.0}, "bits = 16"),
])
def test_activation_format_refuses(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivationFormat(**given)
    with pytest.raises(TypeError, match="zero_point is torch.float32"):
        ActivationFormat(8, scale=1.0, zero_point=0.5)
