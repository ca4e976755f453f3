"""The constant vectors against the paper's attention over one user token, written out here in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from effects import site_vectors
from torch import Tensor

from comfyui_psa.adapter import AdapterConfig, AdapterError, BlockKey, EncoderSpec, PSAAdapter, Site

MakeAdapter = Callable[..., PSAAdapter]

SD_SIZES = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280]
SDXL_SIZES = [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def project(adapter: PSAAdapter, embedding: Tensor) -> Tensor:
    """LayerNorm(W e + b), in float64."""
    weights = {name: tensor.double() for name, tensor in adapter.user_proj.state_dict().items()}
    linear = embedding.double() @ weights["proj.weight"].T + weights["proj.bias"]
    return layer_norm(linear, weights["norm.weight"], weights["norm.bias"])


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head: ``[queries, hidden]``, ``[keys, hidden]`` to ``[queries, hidden]``."""
    outputs = []
    for q, k, v in zip(query.chunk(heads, -1), key.chunk(heads, -1), value.chunk(heads, -1), strict=True):
        outputs.append(torch.softmax(q @ k.T / math.sqrt(q.shape[-1]), dim=-1) @ v)
    return torch.cat(outputs, dim=-1)


def values_of(adapter: PSAAdapter, layer: int) -> Tensor:
    return adapter.state_dict()[f"sites.{layer}.to_v_user.weight"].double()


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, exact: Tensor) -> bool:
    return ours.dtype == torch.float32 and torch.allclose(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hidden", "heads", "queries", "text", "dim"),
    [(8, 1, 5, 12, 10), (24, 3, 7, 12, 10), (64, 8, 16, 20, 33), (320, 5, 64, 48, 96)],
)
def test_vector_is_true_attention_over_the_one_user_token(
    random_adapter: MakeAdapter, hidden: int, heads: int, queries: int, text: int, dim: int
) -> None:
    adapter = random_adapter(hidden_sizes=(hidden, 2 * hidden), cross_attention_dim=text, embedding_dim=dim)
    embedding = draw(1, dim)
    vectors = site_vectors(adapter, embedding)
    token = project(adapter, embedding)
    for layer, width in enumerate((hidden, 2 * hidden)):
        query = draw(queries, width, seed=2).double()
        key = token @ draw(text, width, seed=3).double()
        attended = attend(query, key, token @ values_of(adapter, layer).T, heads)
        assert vectors.user[layer].shape == (1, width)
        assert close(vectors.user[layer].expand(queries, -1), attended)


def test_null_vectors_are_the_values_of_the_projected_zero(random_adapter: MakeAdapter) -> None:
    adapter = random_adapter()
    adapter.embedding_mean.copy_(draw(10, seed=4))
    adapter.embedding_std.copy_(draw(10, seed=5).abs() + 0.5)
    weights = {name: tensor.double() for name, tensor in adapter.user_proj.state_dict().items()}
    token = layer_norm(weights["proj.bias"], weights["norm.weight"], weights["norm.bias"])
    null = site_vectors(adapter, draw(3, 10)).null
    assert null is not None
    assert [vector.shape for vector in null] == [(8,), (16,), (24,)]
    for layer, vector in enumerate(null):
        assert close(vector, values_of(adapter, layer) @ token)


def test_null_is_as_trained_unless_overridden(random_adapter: MakeAdapter) -> None:
    embedding = draw(1, 10)
    published, bare = random_adapter(null="zero_embedding"), random_adapter(null="none")
    assert site_vectors(bare, embedding).null is None
    assert site_vectors(published, embedding, null="none").null is None
    expected = site_vectors(published, embedding).null
    overridden = site_vectors(bare, embedding, null="zero_embedding").null
    assert expected is not None
    assert overridden is not None
    assert all(map(torch.equal, overridden, expected))


def test_null_mode_leaves_the_user_as_it_is(random_adapter: MakeAdapter) -> None:
    adapter, embedding = random_adapter(), draw(2, 10)
    with_null, without = site_vectors(adapter, embedding), site_vectors(adapter, embedding, null="none")
    assert all(map(torch.equal, with_null.user, without.user))


def test_embeddings_are_standardised(random_adapter: MakeAdapter) -> None:
    adapter, embedding = random_adapter(), draw(2, 10)
    mean, std = draw(10, seed=4), draw(10, seed=5).abs() + 0.5
    adapter.embedding_mean.copy_(mean)
    adapter.embedding_std.copy_(std)
    token = project(adapter, (embedding.double() - mean) / std)
    for layer, vector in enumerate(site_vectors(adapter, embedding).user):
        assert close(vector, token @ values_of(adapter, layer).T)


def test_users_are_computed_independently(random_adapter: MakeAdapter) -> None:
    adapter, users = random_adapter(), draw(5, 10)
    together = site_vectors(adapter, users)
    for row, user in enumerate(users):
        alone = site_vectors(adapter, user[None])
        for many, one in zip(together.user, alone.user, strict=True):
            torch.testing.assert_close(many[row], one[0], rtol=1e-5, atol=1e-5)
    for first, second in ((0, 1), (1, 2)):
        assert not torch.equal(together.user[0][first], together.user[0][second])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embedding_of_another_precision_is_taken(random_adapter: MakeAdapter, dtype: torch.dtype) -> None:
    adapter, embedding = random_adapter(), draw(1, 10).to(dtype)
    expected = site_vectors(adapter, embedding.float())
    assert all(map(torch.equal, site_vectors(adapter, embedding).user, expected.user))


def test_new_adapter_adds_exactly_nothing() -> None:
    vectors = site_vectors(PSAAdapter(_config((8, 16), 12, 10)), 100 * draw(4, 10))
    assert vectors.null is not None
    assert [vector.shape for vector in vectors.user] == [(4, 8), (4, 16)]
    assert not any(torch.count_nonzero(vector) for vector in (*vectors.user, *vectors.null))


def test_gradients_reach_everything_that_is_trained() -> None:
    adapter = PSAAdapter(_config((8, 16), 12, 10))
    for site in adapter.sites:
        torch.nn.init.normal_(site.to_v_user.weight)
    sum(vector.square().sum() for vector in site_vectors(adapter, draw(2, 10)).user).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())


@pytest.mark.parametrize(
    ("sizes", "text", "values", "projection"),
    [(SD_SIZES, 768, 9_584_640, 2_754_816), (SDXL_SIZES, 2048, 170_393_600, 7_346_176)],
    ids=["sd1", "sdxl"],
)
def test_parameter_counts_are_the_papers_without_keys(
    sizes: list[int], text: int, values: int, projection: int
) -> None:
    with torch.device("meta"):
        adapter = PSAAdapter(_config(sizes, text, 3584))
    assert _count(adapter.sites) == values
    assert _count(adapter.user_proj) == projection
    assert _count(adapter) == values + projection
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("shape", [(1, 576), (576,), (10,), (1, 1, 10)])
def test_embedding_of_another_shape_is_refused(random_adapter: MakeAdapter, shape: tuple[int, ...]) -> None:
    adapter = random_adapter(encoder=EncoderSpec(kind="llm", name="org/language-model"))
    with pytest.raises(AdapterError) as caught:
        site_vectors(adapter, torch.zeros(shape))
    for word in (str(shape[-1]), "10", str(list(shape)), "org/language-model"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "text"), [(SD_SIZES, 768), (SDXL_SIZES, 2048), ([32, 64, 64], 24)], ids=["sd1", "sdxl", "tiny"]
)
def test_adapter_fits_the_layers_that_it_was_made_for(sizes: list[int], text: int) -> None:
    _on_meta(sizes, text).check_sites(_sites(sizes, text))


@pytest.mark.parametrize(
    ("sizes", "text", "found"),
    [
        (SDXL_SIZES, 2048, "SDXL"),
        (SD_SIZES, 1024, "SD2.x"),
        ([640] * 2 + [1280] * 10 + [640] * 3, 2048, "Segmind-Vega"),
        ([640] * 4 + [1280] * 26 + [640] * 4, 2048, "SSD-1B"),
        (SD_SIZES, 1280, "text width 1280"),
        (SD_SIZES[:-1], 768, "15 cross-attention layers"),
        ([*SD_SIZES, 1280], 768, "17 cross-attention layers"),
        ([32, 64], 24, "2 cross-attention layers"),
    ],
    ids=["sdxl", "sd2", "vega", "ssd-1b", "other-width", "fewer-layers", "more-layers", "tiny"],
)
def test_model_of_another_family_is_refused_and_both_are_named(sizes: list[int], text: int, found: str) -> None:
    with pytest.raises(AdapterError) as caught:
        _on_meta(SD_SIZES, 768).check_sites(_sites(sizes, text))
    trained_for, connected = str(caught.value).split("but the connected model")
    assert "SD1.x" in trained_for
    assert "16 cross-attention layers, text width 768" in trained_for
    assert found in connected


def test_same_layers_in_another_order_are_refused() -> None:
    with pytest.raises(AdapterError):
        _on_meta(SD_SIZES, 768).check_sites(_sites(SD_SIZES[::-1], 768))


def test_one_layer_of_another_text_width_is_refused() -> None:
    with pytest.raises(AdapterError):
        _on_meta(SD_SIZES, 768).check_sites([*_sites(SD_SIZES[:-1], 768), *_sites([1280], 1024)])


def _config(sizes: Sequence[int], text: int, dim: int) -> AdapterConfig:
    return AdapterConfig(
        hidden_sizes=tuple(sizes),
        cross_attention_dim=text,
        embedding_dim=dim,
        encoder=EncoderSpec(kind="attributes", name="1"),
    )


def _on_meta(sizes: Sequence[int], text: int) -> PSAAdapter:
    with torch.device("meta"):
        return PSAAdapter(_config(sizes, text, 16))


def _sites(sizes: Sequence[int], text: int) -> list[Site]:
    return [Site(BlockKey("input", i, 0), f"layer.{i}.attn2", size, text) for i, size in enumerate(sizes)]


def _count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
