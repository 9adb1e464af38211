import re
from html.parser import HTMLParser

from undistilled.prove.page import nats, percent, rate, render, size
from undistilled.prove.receipt import seal

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}'


class Tags(HTMLParser):
    """Tags that open and do not close, and all that a page would fetch."""

    def __init__(self):
        super().__init__()
        self.stack, self.names, self.fetched = [], [], []

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)
        self.fetched += [v for k, v in attributes if k in ("src", "href", "action", "data")]
        assert not any(k.startswith("on") for k, _ in attributes)
        if tag not in ("meta", "br", "link", "img", "input", "rect", "line"):
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.names.append(tag)

    def handle_endtag(self, tag):
        if tag != "rect":
            assert self.stack.pop() == tag


def parsed(page):
    tags = Tags()
    tags.feed(page)
    assert not tags.stack
    return tags


def changed(receipt, **updates):
    return seal({k: v for k, v in receipt.items() if k != "receipt_id"} | updates)


def test_the_page_has_the_figures_and_fetches_nothing(receipt):
    page = render(receipt)
    r = receipt
    for text in (
        nats(r["kl_nats"]["mean"]),
        percent(r["top1_agreement"]),
        size(r["memory"]["predicted"]),
        size(r["memory"]["measured"]),
        rate(r["speed"]["measured"]["decode_tokens_per_s"]["median"]),
        rate(r["speed"]["predicted"]["prefill_tokens_per_s"]),
        f"{r['perplexity']['plan']:.3f}",
        r["receipt_id"],
        r["model"]["fingerprint"],
        r["plan"]["digest"],
        r["text"]["sha256"],
        "The id matches the content",
        "toy, accuracy",
    ):
        assert text in page, text
    tags = parsed(page)
    assert "script" not in tags.names and not tags.fetched and "url(" not in page and "@import" not in page
    assert tags.names.count("rect") == len(r["kl_nats"]["histogram"]["counts"])


def test_an_edited_receipt_is_called_that(receipt):
    page = render(receipt | {"top1_agreement": 1.0})
    assert "This receipt was changed" in page and "does not match" in page


def test_hostile_names_stay_text(receipt):
    r = changed(
        receipt,
        model=receipt["model"] | {"name": HOSTILE},
        tasks={HOSTILE: receipt["tasks"]["toy"]},
        command=HOSTILE,
        machine=receipt["machine"] | {"name": HOSTILE},
        text=receipt["text"] | {"name": HOSTILE},
        plan=receipt["plan"] | {"scheme": HOSTILE},
    )
    page = render(r)
    tags = parsed(page)
    assert "script" not in tags.names and "img" not in tags.names
    assert "&lt;script&gt;" in page and "{{ 7 * 7 }}" in page


def test_what_is_not_established_is_said(receipt):
    flat = {"mean": 0.0, "se": 0.1, "se_by": "tokens", "interval": [-0.2, 0.2]}
    none = receipt["tasks"]["toy"] | {"difference_interval": [-0.1, 0.1], "original_interval": [0.3, 0.7], "kept": 0.9}
    page = render(changed(receipt, perplexity=receipt["perplexity"] | {"log_ratio": flat}, tasks={"toy": none}))
    assert "Not established that the perplexities differ" in page and "Not established that accuracy differs" in page
    assert "better than guessing" in page and "Plan over original" not in page
    known = none | {"difference_interval": [-0.2, -0.1], "original_interval": [0.6, 0.7], "mcnemar_p": 0.01}
    page = render(changed(receipt, tasks={"toy": known}))
    assert "The plan answers worse (" in page and "Plan over original: 90.0%" in page
    page = render(changed(receipt, tasks={"toy": known | {"mcnemar_p": 0.06}}))
    assert "Not established that accuracy differs: the exact paired test does not exclude chance (p = 0.06)" in page
    assert "nothing is shown about the accuracy" in render(changed(receipt, tasks={}))
    apart = receipt["conditions"] | {"same_context": False}
    assert "Not under the same conditions" in render(changed(receipt, conditions=apart))
    for load, said in ((0.1, False), (3.0, True), (None, False)):
        at = receipt["conditions"] | {"load_before": load, "cores": 2}
        assert ("was busy" in render(changed(receipt, conditions=at))) is said


def test_units():
    assert [size(x) for x in (12, 70272, 432_100_000, 1.5e12)] == ["12 B", "70.3 KB", "432 MB", "1.5 TB"]
    assert rate(3.14159) == "3.1 tokens/s" and rate(1234.5) == "1,234 tokens/s" and nats(0.012345) == "0.0123 nats"


def test_no_number_without_a_unit_in_the_bars(receipt):
    values = re.findall(r'class="value">([^<]*)<', render(receipt))
    assert len(values) == 6 and all(re.search(r"(B|tokens/s)$", v) for v in values)
