"""Near duplicates among the neighbours: planted copies are found, and nothing else, before and after training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import Classifier, loader, make_trainer
from torch.utils.data import TensorDataset

from lightning_influence import AuditReport, InfluenceAudit
from lightning_influence.training.neighbours import nearest_examples


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[AuditReport, set[int]]:
    """1,000 digits, 20 exact copies (half with another label), and 20 with a little noise."""
    digits = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    torch.manual_seed(0)
    x, y = torch.tensor(digits[0][:1000], dtype=torch.float32) / 16, torch.tensor(digits[1][:1000])
    noisy = x[20:40] + 0.02 * torch.randn(20, 64)
    x, y = torch.cat([x, x[:20], noisy]), torch.cat([y, y[:40]])
    y[1000:1010] = (y[1000:1010] + 1) % 10
    audit = InfluenceAudit(tracin=None)
    model = Classifier(lambda m: torch.optim.Adam(m.parameters(), 2e-3), features=64)
    model.net = torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    trainer = make_trainer(tmp_path_factory.mktemp("run"), max_epochs=4, callbacks=[audit])
    trainer.fit(model, loader(TensorDataset(x, y), 32, shuffle=True))
    assert audit.has_report, audit
    return AuditReport.load(audit.report.directory), set(range(40)) | set(range(1000, 1040))  # type: ignore[arg-type]


def test_copies_are_found_and_little_else(found: tuple[AuditReport, set[int]]) -> None:
    report, planted = found
    columns, health = report.columns, report.health()
    copies = np.arange(1000, 1020)
    assert columns["nearest"][copies].tolist() == list(range(20))
    assert columns["nearest"][:20].tolist() == copies.tolist()
    assert (columns["nearest_cosine"][copies] > 0.99999).all()
    pairs = set(health.duplicates)
    assert {(n, 1000 + n) for n in range(20)} <= pairs
    assert sum((n, 1000 + n) in pairs for n in range(20, 40)) >= 8
    assert len([pair for pair in pairs if not planted & set(pair)]) <= 1
    assert health.contradicting[:10] == tuple((n, 1000 + n) for n in range(10))
    assert len(health.contradicting) <= 11
    assert "10 with different labels: 0 and 1000" in str(health) or "11 with different labels" in str(health)
    assert health.as_dict()["contradicting"][0] == [0, 1000]
    assert report[1003]["nearest"] == 3


class TestTheBound:
    @pytest.mark.parametrize("dimension", [2, 3, 8, 64])
    def test_no_copies_no_duplicates(self, dimension: int) -> None:
        """In two dimensions a thousand cosines of nearest neighbours are all above .99999, by chance."""
        generator = torch.Generator().manual_seed(dimension)
        features = torch.randn(1000, dimension, generator=generator)
        _, cosines, copies = nearest_examples(features)
        assert int(copies.sum()) <= 2
        if dimension == 2:
            assert float(cosines.median()) > 0.99999

    def test_collapsed_classes_are_no_copies(self) -> None:
        """At the end of training the examples of a class may all have nearly the same features."""
        generator = torch.Generator().manual_seed(0)
        centres = torch.randn(5, 16, generator=generator).repeat_interleave(100, 0)
        features = centres + 5e-3 * torch.randn(500, 16, generator=generator)
        features[499] = features[0]
        nearest, cosines, copies = nearest_examples(features)
        assert (cosines > 0.999).all()
        assert copies.nonzero().squeeze(1).tolist() == [0, 499]
        assert (nearest[0], nearest[499]) == (499, 0)

    def test_unknown_features_and_few_examples(self) -> None:
        features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        features[3], features[4] = torch.nan, torch.inf
        nearest, cosines, copies = nearest_examples(features)
        assert nearest[3] == nearest[4] == -1
        assert not {3, 4} & set(nearest[[0, 1, 2, *range(5, 30)]].tolist())
        assert cosines[3:5].isnan().all()
        assert not copies[3:5].any()
        for few in (torch.zeros(0, 4), torch.ones(1, 4), torch.ones(4, 4), torch.zeros(20, 4)):
            assert not nearest_examples(few)[2].any()


def test_targets_of_a_regression_that_are_far_off() -> None:
    from lightning_influence.audit.ranking import rank

    generator = np.random.default_rng(0)
    residuals = np.abs(generator.standard_normal(2000))
    clean = AuditReport(rank({"index": np.arange(2000), "el2n": residuals}))
    residuals = residuals + 6 * (np.arange(2000) < 30)
    report = AuditReport(rank({"index": np.arange(2000), "el2n": 7 * residuals}))
    assert clean.health().inspect <= 4  # 0.9 are expected
    assert 30 <= report.health().inspect <= 34
    assert set(report.ranking[:30].tolist()) == set(range(30))
    assert not len(report.candidates)
    assert "0.9 would be if residuals were normal" in str(report)
    assert "targets are over 3.5 robust deviations" in str(report.health())
    assert AuditReport(rank({"index": np.arange(9), "el2n": np.zeros(9)})).health().inspect == 0
