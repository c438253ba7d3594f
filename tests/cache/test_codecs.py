import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stablekd_fast.cache.codecs import RowFormat
from stablekd_fast.cache.settings import CacheSettings, parse_bytes
from stablekd_fast.errors import ConfigError

LAYOUTS = {
    "NCHW": (torch.randn(4, 6, 5, 5), 1),
    "channels last": (torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last), 1),
    "NHWC": (torch.randn(4, 5, 5, 6), -1),
    "tokens": (torch.randn(4, 9, 6), -1),
    "vectors": (torch.randn(4, 6), 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec, error", [("fp32", 0.0), ("bf16", 2**-8), ("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_what_is_decoded_is_near_and_laid_out_alike(layout, codec, error):
    values, axis = LAYOUTS[layout]
    form = RowFormat.of(codec, values, axis)
    parts = form.encode(values)
    for part, stored in zip(form.parts, parts):
        assert stored.shape == (4, *part.shape) and stored.dtype == part.dtype and stored.is_contiguous()
    back = form.decode(parts)
    assert back.dtype == torch.float32 and back.stride() == values.stride()
    others = [d for d in range(1, values.dim()) if d != axis % values.dim()]
    largest = values.abs().amax(others, keepdim=True) if others else values.abs()
    assert ((back - values).abs() <= error * largest + 1e-7).all()
    assert form.lossless == torch.equal(back, values) or codec in ("int8", "fp8", "bf16")
    # what came back once stays: a row that is encoded anew gives the same bits
    assert torch.equal(form.decode(form.encode(back)), back) or codec == "int8"


def test_row_bytes_are_what_is_stored():
    assert [RowFormat(codec, (64, 8, 8)).row_bytes for codec in ("fp32", "bf16", "int8", "fp8")] == [
        16384, 8192, 4096 + 256, 4096 + 256,
    ]  # fmt: skip
    assert RowFormat("top10", (1000,)).row_bytes == 10 * (2 + 2) + 4


def test_logits_keep_the_largest_and_the_rest_s_weight():
    logits = torch.randn(8, 100) * 3
    form = RowFormat.of("top10", logits)
    back = form.decode(form.encode(logits))
    top = logits.topk(10).indices
    assert torch.allclose(back.gather(1, top), logits.gather(1, top), rtol=1e-3)
    assert torch.allclose(back.logsumexp(1), logits.logsumexp(1), atol=2**-8 + 1e-4)  # float16 between 8 and 16
    assert back.argmax(1).equal(logits.argmax(1))
    half = RowFormat.of("fp16", logits)
    assert torch.equal(half.decode(half.encode(logits)), logits.half().float())
    everything = RowFormat.of("top100", logits)
    assert torch.equal(everything.decode(everything.encode(logits)), logits.half().float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "fp8", "top4"])
def test_what_a_teacher_computes_in_16_bits_comes_back_in_them(codec, dtype):
    values = torch.randn(4, 6).to(dtype) if codec == "top4" else LAYOUTS["channels last"][0].to(dtype)
    form = RowFormat.of(codec, values)
    back = form.decode(form.encode(values))
    assert back.dtype == dtype and back.stride() == values.stride()
    exact = codec == "fp32" or (codec == "bf16" and dtype == torch.bfloat16)
    assert form.lossless == exact
    if exact:
        assert torch.equal(back, values) and form.row_bytes == 2 * values[0].numel()


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "fp8", "top10"])
def test_on_a_gpu_everything_stays_there(codec):
    with FakeTensorMode():
        values = torch.empty((4, 100) if codec == "top10" else (4, 6, 5, 5), device="cuda")
        form = RowFormat.of(codec, values)
        parts = form.encode(values)
        assert {part.device.type for part in (*parts, form.decode(parts))} == {"cuda"}
        assert [(part.dtype, tuple(part.shape[1:])) for part in parts] == [(p.dtype, p.shape) for p in form.parts]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"codecs": ["int4"]}, "no codec 'int4'; choose from fp32, bf16, int8, fp8"),
        ({"codecs": []}, "No codec was given"),
        ({"logits": "top0"}, "'top0' does not exist"),
        ({"host_budget": "much"}, "cache.host_budget='much' was given; write a number of bytes such as"),
        ({"images": True}, "give --cache.directory"),
        ({"disk_budget": "1GB"}, "give --cache.directory"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        CacheSettings(**settings)


def test_bytes_are_read_as_people_write_them():
    found = [parse_bytes(text, "x") for text in ("0", "1500", "200GB", "1.5 TB", "64k", "10M")]
    assert found == [0, 1500, 200 * 10**9, 1500 * 10**9, 64_000, 10**7]
