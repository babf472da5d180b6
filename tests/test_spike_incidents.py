import json
import math

import pytest

from lightning_align.spike_causes import Cause
from lightning_align.spike_incidents import BatchRecord, Incident, LayerRecord
from lightning_align.stability import SpikeVerdict


def an_incident(**changed):
    values = {
        "step": 160,
        "position": 321,
        "num_batches": 2,
        "epoch": 3,
        "loss": 9.5,
        "grad_norm": math.inf,
        "reason": "grad norm",
        "norm_threshold": 1.5,
        "action": "skip",
        "skipped": [[321, 323]],
        "batches": [BatchRecord(321, 0, 9.5, None, [4, 7], ["NaN", "a ✓"]), BatchRecord(322)],
        "layers": [LayerRecord("layers.0", score=math.nan, since=0)],
        "first_layers": ["layers.0"],
        "cause": Cause("numerics", "layers.0", "text", {"factor": -math.inf}),
        "lrs": [0.1, 0.1],
        "history": {"step": [159, 160], "loss": [1.0, 9.5]},
        "missing": ["nothing"],
        "stream": {"seed": 0, "fingerprint": "NaN"},
    }
    return Incident(**(values | changed))


def test_an_incident_is_read_again_as_it_was():
    before = an_incident()
    after = Incident.from_json(before.to_json())
    assert math.isnan(after.layers[0].score)
    after.layers[0].score = before.layers[0].score  # NaN equals nothing
    assert after == before


def test_its_json_is_read_by_strict_readers():
    """RFC 8259 has neither NaN nor infinity."""

    def refuse(word):
        raise AssertionError(word)

    json.loads(an_incident().to_json(), parse_constant=refuse)


def test_what_a_later_version_adds_is_left_out():
    values = json.loads(an_incident(layers=[], grad_norm=2.0).to_json()) | {"new": 1}
    assert Incident.from_json(json.dumps(values)).grad_norm == 2.0


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": 1}', '{"step": 1, "batches": 3}'])
def test_what_is_no_incident_is_refused_with_its_source(text):
    with pytest.raises(ValueError, match=r"source='a.json'\): is no report of an incident"):
        Incident.from_json(text, "a.json")


def test_an_incident_has_what_the_verdict_says():
    verdict = SpikeVerdict(7, True, "loss", 9.0, 2.0, loss_score=8.0, loss_limit=3.0)
    incident = Incident.of(verdict, position=70, num_batches=1, epoch=0, action="skip")
    assert (incident.step, incident.loss, incident.loss_limit) == (7, 9.0, 3.0)
    assert (incident.position, incident.action, incident.reason) == (70, "skip", "loss")
