"""Every family against a reference that is written row by row, and against dictionaries whose features are known."""

import math

import pytest
import torch

from husai.dictionaries import jumprelu, matryoshka
from husai.dictionaries.families import FAMILIES, SAE_FAMILIES, family_of
from husai.dictionaries.family import Batch, Shape
from husai.dictionaries.sae import SAE
from husai.stability.scores import max_cosines
from husai.training.stack import Member
from husai.training.trainer import TrainingConfig, evaluate, train

D_IN, D_OUT, D_SAE, ROWS = 6, 5, 32, 9
PENALTY = 0.07


def stack(family, n=2, seed=0):
    """Random parameters, buffers and a batch, float64, nothing at its initial value."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    d_out = D_OUT if "transcoder" in family else D_IN
    shape = Shape(D_IN, d_out, D_SAE)
    params = FAMILIES[family].init(shape, [torch.Generator().manual_seed(i) for i in range(n)])
    params = {name: (p.double() + 0.3 * draw(*p.shape)) for name, p in params.items()}
    if "threshold" in params:
        params["threshold"] = params["threshold"].abs()
    params["W_enc"] = params["W_enc"].transpose(1, 2).contiguous().transpose(1, 2)
    params = {name: p.requires_grad_() for name, p in params.items()}
    buffers = {
        "threshold": torch.full((n,), -1.0, dtype=torch.float64),
        "penalty": torch.full((n,), PENALTY, dtype=torch.float64),
    }
    x = draw(n, ROWS, D_IN)
    return params, buffers, x, draw(n, ROWS, d_out) if "transcoder" in family else x


def plain_loss(family, p, x, y, k, dead):
    """One member's loss as its paper writes it, dense, with plain autograd."""
    transcoder = "transcoder" in family
    rows, variance = x.shape[0], y.shape[1]
    shared = (x if transcoder else x - p["b_dec"]) @ p["W_enc"]
    if family == "gated":
        gate = shared + p["b_gate"]
        features = torch.relu(shared * torch.exp(p["r_mag"]) + p["b_mag"]) * (gate > 0)
        frozen = y - (torch.relu(gate) @ p["W_dec"].detach() + p["b_dec"].detach())
        extra = frozen.square().sum() / variance + PENALTY * torch.relu(gate).sum() / math.sqrt(variance)
        return ((y - features @ p["W_dec"] - p["b_dec"]).square().sum() / variance + extra) / rows
    pre = shared + p["b_enc"]
    if family == "relu":
        features = torch.relu(pre)
        penalty = PENALTY * (features * p["W_dec"].norm(dim=1)).sum() / math.sqrt(variance)
        return ((y - features @ p["W_dec"] - p["b_dec"]).square().sum() / variance + penalty) / rows
    if family == "jumprelu":
        # The estimators as a surrogate: its value is the loss, its derivative theirs.
        pre, theta = torch.relu(pre), p["threshold"]
        active = (pre > theta).double()
        near = ((pre - theta).abs() < jumprelu.BANDWIDTH / 2).double() / jumprelu.BANDWIDTH
        jump = -near * (theta - theta.detach())
        features = pre * active + theta.detach() * jump
        count = active + jump
        error = (y - features @ p["W_dec"] - p["b_dec"]).square().sum() / variance
        return (error + PENALTY * count.sum() / D_SAE) / rows
    mask = torch.zeros_like(pre)
    if family == "topk":
        mask.scatter_(1, pre.topk(k, dim=1).indices, 1.0)
    else:
        mask.view(-1)[pre.flatten().topk(k * rows).indices] = 1.0
    features = torch.relu(pre) * mask
    out = p["b_dec"] + (x @ p["W_skip"] if "W_skip" in p else 0)
    error = y - features @ p["W_dec"] - out
    sizes = [*matryoshka.prefixes(D_SAE), D_SAE] if family == "matryoshka" else [D_SAE]
    nested = [(y - features[:, :s] @ p["W_dec"][:s] - out).square().sum() for s in sizes]
    loss = sum(nested) / len(sizes) / (rows * variance)
    if len(dead):
        columns = pre[:, dead]
        kept = columns.topk(min(D_IN // 2, len(dead)), dim=1).indices
        revived = torch.relu(columns) * torch.zeros_like(columns).scatter(1, kept, 1.0)
        target = error.detach()
        loss = loss + (target - revived @ p["W_dec"][dead]).square().sum() / target.square().sum() / 32
    return loss


def test_a_family_is_found_by_what_its_saes_are():
    """By SAELens' name, which the trained SAE bears, and by HUSAI's own."""
    for name in SAE_FAMILIES:
        architecture = FAMILIES[name].ARCHITECTURE
        assert architecture == FAMILIES[family_of(architecture)].ARCHITECTURE
        assert family_of(name) == name
    assert (family_of("standard"), family_of("jumprelu")) == ("relu", "jumprelu")
    assert family_of("temporal") == "topk", "HUSAI trains none like it"


@pytest.mark.parametrize("dead_counts", [(0, 0), (4, 0), (1, 20)])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_the_plain_reference(family, dead_counts):
    params, buffers, x, y = stack(family)
    k = (3, 5)
    dead = tuple(torch.arange(D_SAE - count, D_SAE) for count in dead_counts)
    outcome = FAMILIES[family].loss(params, buffers, Batch(x, y, k, dead))
    assert (outcome.error <= outcome.loss + 1e-12).all() or family == "matryoshka"
    outcome.loss.sum().backward()
    for i in range(2):
        single = {name: t[i].detach().clone().requires_grad_() for name, t in params.items()}
        expected = plain_loss(family, single, x[i], y[i], k[i], dead[i])
        expected.backward()
        torch.testing.assert_close(outcome.loss[i], expected, rtol=1e-12, atol=0)
        for name, t in params.items():
            torch.testing.assert_close(
                t.grad[i], single[name].grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert single["W_enc"].grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["topk", "batchtopk", "matryoshka", "transcoder"])
def test_aux_gradient_reaches_the_encoder_of_dead_features(family):
    params, buffers, x, y = stack(family, n=1)
    with torch.no_grad():
        params["b_enc"][0, 0] = 1e-3  # positive, and never among the k largest …
        params["W_enc"][0, :, 0] *= 1e-9
    gradients = []
    for dead in (torch.arange(0), torch.arange(1)):
        FAMILIES[family].loss(params, buffers, Batch(x, y, (2,), (dead,))).loss.sum().backward()
        gradients.append([params[n].grad[0, ..., 0].abs().sum().item() for n in ("W_enc", "b_enc")])
        for p in params.values():
            p.grad = None
    assert gradients[0] == [0.0, 0.0]
    assert min(gradients[1]) > 0, "… and AuxK alone moves it"


@pytest.mark.parametrize("family", FAMILIES)
def test_members_start_apart_and_by_their_seed_alone(family):
    draw = lambda *seeds: FAMILIES[family].init(  # noqa: E731
        Shape(D_IN, D_IN, D_SAE), [torch.Generator().manual_seed(s) for s in seeds]
    )
    both, other = draw(1, 2), draw(2)
    for name, p in both.items():
        assert torch.equal(p[1], other[name][0])
    assert not torch.equal(both["W_dec"][0], both["W_dec"][1])
    if "transcoder" not in family:
        assert torch.equal(both["W_enc"], both["W_dec"].transpose(1, 2))


def test_batchtopk_threshold_stands_in_for_the_batch():
    """The running mean of the smallest kept value, and the L0 it gives row by row is near k."""
    params, buffers, x, y = stack("batchtopk")
    pre = torch.bmm(x - params["b_dec"].unsqueeze(1), params["W_enc"]) + params["b_enc"].unsqueeze(1)
    smallest = torch.stack([pre[i].flatten().topk(k * ROWS).values[-1] for i, k in enumerate((3, 5))]).detach()
    batch = Batch(x, y, (3, 5), (torch.arange(0),) * 2)
    FAMILIES["batchtopk"].loss(params, buffers, batch)
    torch.testing.assert_close(buffers["threshold"], smallest)
    buffers["threshold"].mul_(2)
    FAMILIES["batchtopk"].loss(params, buffers, batch)
    torch.testing.assert_close(buffers["threshold"], smallest * (2 * 0.99 + 0.01))


def test_matryoshka_prefixes_nest():
    assert matryoshka.prefixes(1024) == (64, 128, 256, 512)
    assert matryoshka.prefixes(8) == (1, 2, 4)


# ---------------------------------------------------------------------------------------------------------------------
# Positive control: dictionaries whose features are known


@pytest.fixture(scope="module")
def synthetic():
    """Rows of SAELens' synthetic model: 48 features in 24 coordinates, 4.8 of them active on average."""
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary

    torch.manual_seed(0)
    dictionary = FeatureDictionary(num_features=48, hidden_dim=24)
    generator = ActivationGenerator(num_features=48, firing_probabilities=0.1)
    with torch.no_grad():
        x = dictionary(generator.sample(20_000))
    return x.float(), torch.nn.functional.normalize(dictionary.feature_vectors.detach(), dim=1)


RECOVERED = {"topk": 0.9, "batchtopk": 0.9, "relu": 0.9, "gated": 0.9, "jumprelu": 0.75, "matryoshka": 0.5}
EXPLAINED = {"relu": 0.4}  # an L1 penalty shrinks what is active; 0.6 for all others


@pytest.mark.nightly  # each family takes the same steps as its plain PyTorch version in the fast tests
def test_every_family_recovers_known_features_at_its_target_l0(make_store, synthetic, tmp_path):
    """Cosine above 0.9 with a trained feature for the share in RECOVERED of the true features; next to none before
    training. Matryoshka's small dictionaries hold mixtures of features by design."""
    x, features = synthetic
    store = make_store(x)
    config = TrainingConfig(tokens=1_000_000, batch_size=512)
    members = [Member(1, 64, 5, 5e-3, 1, family) for family in SAE_FAMILIES]
    trained, _ = train(store, members, config, torch.device("cpu"), tmp_path / "s")
    for t in trained:
        family = t.member.family
        found, _ = max_cosines(features, t.sae.W_dec)
        before, _ = max_cosines(features, t.decoders[0])
        figures, _ = evaluate(t.sae, store, store.split(0.2)[1])
        assert (found > 0.9).float().mean() >= RECOVERED[family], family
        assert (before > 0.9).float().mean() < 0.1
        assert figures.l0 == pytest.approx(5, rel=0.1), family
        assert figures.explained_variance > EXPLAINED.get(family, 0.6), family


def test_jumprelu_thresholds_are_calibrated():
    """One factor for all thresholds, and exactly k features a row; nothing else changes."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1)
    x, theta = torch.randn(500, 16, generator=g), torch.rand(40, generator=g) + 0.1
    weights = {"W_enc": W.T.contiguous(), "b_enc": torch.zeros(40), "W_dec": W, "b_dec": torch.zeros(16)}
    sae = SAE(weights | {"threshold": theta}, "jumprelu")
    for k in (1, 4, 9):
        found = jumprelu.calibrated(sae, x, k)
        assert (found.encode(x) > 0).sum().item() == pytest.approx(k * 500, abs=1)
        factor = found.weights["threshold"] / theta
        torch.testing.assert_close(factor, factor[:1].expand(40))
    assert jumprelu.calibrated(sae, x, 40).weights["threshold"].max() < 0.1, "more than are positive: nearly all"
    assert jumprelu.calibrated(sae, torch.zeros(3, 16), 2) is sae


def test_jumprelu_thresholds_learn(make_store, planted, tmp_path):
    """They leave their start, by features apart, and higher for a sparser target."""
    config = TrainingConfig(tokens=100_000, batch_size=256)
    members = [Member(1, 40, k, 5e-3, 1, "jumprelu") for k in (2, 8)]
    trained, _ = train(make_store(planted[0]), members, config, torch.device("cpu"), tmp_path / "s")
    start, scale = (
        jumprelu.INITIAL_THRESHOLD,
        16**0.5 / planted[0].sub(planted[0].mean(0)).norm(dim=1).square().mean() ** 0.5,
    )
    sparse, dense = (t.sae.weights["threshold"] * scale for t in trained)
    assert sparse.std() > 0.01
    assert (sparse - start).abs().median() > 0.05
    assert sparse.mean() > dense.mean()


@pytest.mark.slow
def test_sparsity_against_explained_variance_on_modular_addition(small_activations, tmp_path):
    """More active features explain more, in every family, far above what the untrained SAE explains."""
    from husai.activations.store import ActivationStore

    store = ActivationStore.open(small_activations)
    config = TrainingConfig(tokens=60_000, batch_size=256)
    ks = (2, 8)
    members = [Member(1, 32, k, 5e-3, 1, family) for family in SAE_FAMILIES for k in ks]
    trained, _ = train(store, members, config, torch.device("cpu"), tmp_path / "s")
    figures = [evaluate(t.sae, store, store.split(0.2)[1])[0] for t in trained]
    for family, few, many in zip(SAE_FAMILIES, figures[::2], figures[1::2], strict=True):
        assert few.l0 < many.l0, family
        assert 0 < few.explained_variance < many.explained_variance < 1, family
        assert many.explained_variance > 0.5, family
