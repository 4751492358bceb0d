"""notebooks/playground.html in a headless Chromium, against hestia.py and autograd.

A copy of the page gets one more script, which calls the page's functions, moves its controls and
writes what it finds into the document. Chromium prints the document.
"""

import html
import json
import math
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import torch

import hestia
import plots

PAGE = Path(hestia.__file__).resolve().parent / "notebooks/playground.html"
CODEBOOKS = {"TERNARY": hestia.TERNARY, "BINARY": hestia.BINARY, "TWO_BIT": hestia.TWO_BIT}
TAUS = [0.0, 1e-4, 0.005, 0.02, 0.1, 0.35, 0.5, 1.0, 2.0]
Z = [k / 20 for k in range(-60, 61)]  # every boundary is on it
MOMENTS = [(t, T, rho) for T in (1, 7, 160) for rho in (0.0, 0.05, 0.2, 0.5, 1.0)
           for t in (0, 0.1 * T, rho * T, 0.5 * T, 0.9 * T, T)]
TRACES = [[226, 57.1, 16.4, 8.94, 2.94], [-226, 57.1, 16.4, 8.94, 2.94], [1, 0, -3, 1e6], [5, 5, 5]]
KAPPAS = [0.0, 0.3, 1.0, 4.0]
WALKS = [(w, steps, tau, p) for w in (-1.5, 0.1, 0.5) for steps in (0, 1, 10)
         for tau in (0.0, 0.02, 0.35) for p in (0.0, 0.6, 1.0)]
one = plots.UNIT

SCRIPT = """<script>
const found = {}, books = Object.keys(CODEBOOKS), given = GIVEN;
for (const kind of ["soft_quantize", "soft_quantize_jacobian"]) {
  const f = { soft_quantize, soft_quantize_jacobian }[kind];
  found[kind] = books.map(b => given.taus.map(tau => given.z.map(z => f(z, tau, CODEBOOKS[b]))));
}
found.pi = given.taus.map(tau => given.z.map(z => assignment_probs(z, tau, TWO_BIT)));
found.nearest = books.map(b => given.z.map(z => nearest_code(z, CODEBOOKS[b])));
found.pressure = given.moments.map(m => pressure(...m));
found.temperature = given.moments.map(m => temperature(...m, 0.3, 0.8, -0.4));
found.scores = given.traces.map(h => given.kappas.map(k => sensitivity_scores(h, k)));
found.mean = books.map(b => given.taus.map(tau => mean_slope(tau, CODEBOOKS[b])));
found.felt = books.map(b => given.taus.map(tau => felt_share(tau, CODEBOOKS[b])));
const path = (w, n, slope, f) => walk(w, n, slope).map(z => [z, f(z)]);
found.ste = given.walks.map(([w, n]) => path(w, n, () => 1, z => nearest_code(z, TERNARY)));
found.hestia = given.walks.map(([w, n, ...how]) => path(
  w, n, z => effective_slope(z, ...how, TERNARY), z => effective_weight(z, ...how, TERNARY)));
found.passes = [0, 0.05, 0.2, 0.35, 0.5].map(tau => [tau, passes(tau, 0.2, 0.3, 0.8, 0.4)]);
found.tensors = TENSORS;

const readings = () => Object.keys(PICTURES).map(id => $(`reading-${id}`).textContent);
const isTick = c => c.type === "checkbox";
const values = () => Object.fromEntries(CONTROLS.map(c => [c.id, isTick(c) ? c.checked : c.value]));

// what is wrong with the page as it is drawn now
function flaws(width) {
  const found = [], shown = document.querySelector("main").outerHTML;
  if (/NaN|undefined|Infinity|null/.test(shown)) found.push("a value is no number");
  for (const e of document.body.querySelectorAll("*")) {
    if (e.getBoundingClientRect().right > width + 1) found.push(`${e.tagName} ${e.id} is too wide`);
  }
  const box = e => ({ ...e.getBoundingClientRect().toJSON(), name: e.textContent || e.id });
  const crossing = boxes => boxes.forEach((a, i) => boxes.slice(i + 1).forEach(b => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (x > 0.5 && y > 2) found.push(`${a.name} and ${b.name} overlap`);
  }));
  for (const picture of document.querySelectorAll("figure > svg")) {
    const texts = [...picture.querySelectorAll("text")].map(box);
    const edge = picture.getBoundingClientRect();
    crossing(texts);
    for (const t of texts) {
      const inside = t.left > edge.left - 1 && t.right < edge.right + 1;
      if (!inside || t.top < edge.top - 1 || t.bottom > edge.bottom + 1)
        found.push(`${t.name} leaves picture ${picture.id}`);
    }
  }
  for (const row of document.querySelectorAll(".row")) crossing([...row.children].map(box));
  crossing([...document.querySelector("main").children].map(box));
  return found;
}

const move = (control, value) => {
  if (isTick(control)) control.checked = value;
  else control.value = value;
  control.dispatchEvent(new Event("input"));
};
const ends = c => isTick(c) ? [true, false] : c.type === "range" ? [c.min, c.max] : books;
found.flaws = {};
found.unmoved = [];
for (const width of [320, 390, 1280]) {
  document.documentElement.style.width = `${width}px`;
  const note = what => {
    for (const flaw of flaws(width)) (found.flaws[flaw] ??= []).push(`${what}, ${width} px`);
  };
  apply("");
  note("as it opens");
  for (const control of CONTROLS) {
    const looks = ends(control).map(end => {
      move(control, end);
      note(`${control.id} at ${end}`);
      return Object.keys(PICTURES).map(id => $(id).innerHTML).join();
    });
    if (looks[0] === looks[1]) found.unmoved.push(control.id);
    apply("");
  }
  for (const tau of [0, 0.005, 1]) for (const book of books) for (const w of [-1.5, 0.5]) {
    move($("tau"), tau);
    move($("codebook"), book);
    move($("w"), w);
    note(`tau ${tau}, ${book}, w ${w}`);
  }
  for (const [id, value] of Object.entries({ rho: 0, alpha: 1, kappa: 4, negative: true })) {
    move($(id), value);
    note(`${id} ${value}`);
  }
}

apply("");
found.start = values();
found.links = [...document.querySelectorAll("nav a")].map(link => {
  link.click();
  return { ...values(), readings: readings() };
});
apply("#tau=0.2&codebook=THREE&colour=red");
found.wrong = values();
found.passing = [0, 0.42, 0.46, 1].map(tau => {
  apply(`#tau=${tau}`);
  return [$("four").querySelectorAll("circle").length, readings()[3]];
});

// a clock of ours: a frame a second
const frames = [];
window.requestAnimationFrame = f => frames.push(f);
performance.now = () => 0;
apply("");
$("play").click();
found.played = [];
for (let second = 0; frames.length; second++) {
  frames.shift()(1000 * second);
  found.played.push([moment, Number($("p").value), Number($("tau").value)]);
}
found.idle = $("play").textContent;

found.unnamed = CONTROLS.filter(c => !c.labels.length).map(c => c.id);
found.silent = [...document.querySelectorAll("figure > svg")].filter(svg =>
  svg.getAttribute("role") !== "img" ||
  svg.getAttribute("aria-labelledby").split(" ").some(id => !$(id).textContent.trim()),
).map(svg => svg.id);
found.spoken = CONTROLS.map(c => c.getAttribute("aria-valuetext"));
document.body.innerHTML = "<pre id=found></pre>";
$("found").textContent = JSON.stringify(found);
</script></body>"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What SCRIPT found, from one start of the browser."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("needs a Chromium: apt-get install --no-install-recommends chromium")
    folder = tmp_path_factory.mktemp("page")
    given = {"taus": TAUS, "z": Z, "moments": MOMENTS, "traces": TRACES, "kappas": KAPPAS,
             "walks": WALKS}
    script = SCRIPT.replace("GIVEN", json.dumps(given), 1)
    copy = folder / "copy.html"
    copy.write_text(PAGE.read_text("utf-8").replace("</body>", script), "utf-8")
    # as root, which CI may be, Chromium has no sandbox
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900",
               f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    result = re.search(r'<pre id="found">(.*?)</pre>', run.stdout, re.S)
    assert result, f"the page's script stopped: {run.stderr[-2000:]}"
    return json.loads(html.unescape(result[1]))


def close(ours, expected, tolerance=1e-6):
    """Within 1e-6, or within 1e-6 of what is large: J is 5,000 at tau = 1e-4."""
    ours = torch.tensor(ours, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_H_J_and_the_codes_are_those_of_hestia(found):
    z = torch.tensor(Z, dtype=torch.float64)
    for b, codebook in enumerate(CODEBOOKS.values()):
        close(found["nearest"][b], hestia.nearest_code(z, codebook))
        for k, tau in enumerate(TAUS):
            how = dict(tau=tau, codebook=codebook, scale=one)
            close(found["soft_quantize"][b][k], hestia.soft_quantize(z, **how))
            close(found["soft_quantize_jacobian"][b][k], hestia.soft_quantize_jacobian(z, **how))
    for k, tau in enumerate(TAUS):
        close(found["pi"][k], hestia.assignment_probs(z, tau, codebook=hestia.TWO_BIT, scale=one))


def test_p_tau_and_the_scores_are_those_of_hestia(found):
    close(found["pressure"], [hestia.pressure(*m) for m in MOMENTS])
    close(found["temperature"], [hestia.temperature(*m, 0.3, 0.8, -0.4) for m in MOMENTS])
    for i, h in enumerate(TRACES):
        for k, kappa in enumerate(KAPPAS):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of negative traces
                scores = hestia.sensitivity_scores(dict(zip("abcde", h)), kappa)
            close(found["scores"][i][k], list(scores.values()))
    for tau, t in found["passes"]:
        if t is None:
            assert tau > hestia.temperature(0, 1, 0.2, 0.3, 0.8, 0.4)
        else:
            assert abs(hestia.temperature(t, 1, 0.2, 0.3, 0.8, 0.4) - tau) < 1e-9


def test_steps_are_those_of_autograd(found):
    """A walk is gradient descent on -W_eff: plain SGD through hestia's own backward passes."""
    for k, (w, steps, tau, p) in enumerate(WALKS):
        views = {"ste": lambda w: hestia.quantize_ste(w, scale=one),
                 "hestia": lambda w: hestia.effective_weight(w, tau, p, scale=one)}  # noqa: B023
        for way, view in views.items():
            latent, path = torch.tensor([w], dtype=torch.float64, requires_grad=True), []
            optimizer = torch.optim.SGD([latent], lr=0.05)
            for _ in range(steps + 1):
                path.append([latent.item(), view(latent).item()])
                optimizer.zero_grad()
                (-view(latent)).sum().backward()
                optimizer.step()
            # a step may end within rounding of a boundary, where two right answers differ by 1
            safe = [j for j, (z, _) in enumerate(path) if abs(abs(z) - 0.5) > 1e-9]
            close([found[way][k][j] for j in safe], [path[j] for j in safe])


def test_the_mean_slope_of_gaussian_weights(found):
    w = plots.gaussian_weights(20_000)
    for b, codebook in enumerate(CODEBOOKS.values()):
        for k, tau in enumerate(TAUS[2:], 2):
            J = hestia.soft_quantize_jacobian(w, tau, codebook=codebook, scale=one)
            close(found["mean"][b][k], J.mean(), 5e-4)
            close(found["felt"][b][k], (J >= 0.05).double().mean(), 5e-3)
    # the density of w / gamma at the two boundaries: what Lemma 4.2 leaves
    density = torch.distributions.Normal(0, (torch.pi / 2) ** 0.5).log_prob(torch.tensor(0.5)).exp()
    close(found["mean"][0][0], 2 * density.item(), 1e-4)
    assert [round(found["mean"][0][k], 3) for k in (TAUS.index(0.35), 0)] == [0.573, 0.588]


def test_the_traces_are_those_of_the_default_run(found):
    results = plots.read_results(PAGE.parent / "results/cpu-3-seeds.json")
    tensors = plots.first_sensitivities(results)
    known = {plots.short(name): tensor["value"] for name, tensor in tensors.items()}
    assert found["tensors"] == [[name, float(f"{known[name]:.3g}")] for name, _ in found["tensors"]]


def test_every_control_moves_a_picture_and_nothing_overlaps(found):
    assert found["flaws"] == {}
    assert found["unmoved"] == []


def test_the_links_set_the_controls(found):
    dead, boundary, cold, negative, again = found["links"]
    assert (dead["tau"], dead["w"], dead["steps"]) == ("0.35", "0.1", "6")
    assert "the output by 0.00\N{NO-BREAK SPACE}γ. HESTIA" in dead["readings"][0]
    # slope 1 / (2 tau) = 25: a step of 0.05 becomes one of 1.25
    assert "HESTIA moves the weight by 1.25" in boundary["readings"][0]
    assert "mean slope is 0.588" in cold["readings"][2]
    assert negative["negative"] is True
    assert {key: again[key] for key in found["start"]} == found["start"]
    assert found["wrong"] == {**found["start"], "tau": "0.2"}


def test_a_dot_for_each_tensor_that_is_ever_as_warm(found):
    factors = [math.exp(0.4 * s) for s in
               hestia.sensitivity_scores(dict(zip("abcde", TRACES[0]))).values()]
    dots = [sum(0.35 * factor >= tau for factor in factors) for tau in (0, 0.42, 0.46, 1)]
    assert [count for count, _ in found["passing"]] == dots and len(set(dots)) == 4
    assert "together, at the end" in found["passing"][0][1]
    assert "No tensor is ever as warm" in found["passing"][3][1]


def test_play_goes_along_the_schedules_and_stops(found):
    score = max(hestia.sensitivity_scores(dict(zip("abcde", TRACES[0]))).values())
    assert found["played"][-1] == [None, 1.0, 0.0] and found["idle"] == "Play a training"
    assert len(found["played"]) == 11
    for second, (moment, p, tau) in enumerate(found["played"][:-1]):
        assert abs(moment - second / 10) < 1e-9
        assert abs(p - hestia.pressure(moment, 1, 0.2)) <= 0.005 + 1e-9  # half a slider's step
        assert abs(tau - hestia.temperature(moment, 1, 0.2, 0.35, score, 0.4)) <= 0.0025 + 1e-9


def test_screen_readers_get_names_and_values(found):
    assert found["unnamed"] == [] and found["silent"] == []
    assert found["spoken"][:2] == ["0", "0.3 γ"]  # where the played training ended


def test_the_page_is_one_small_file_that_asks_no_network():
    page = PAGE.read_text("utf-8")
    assert len(page.encode()) < 100_000
    assert not re.search(r"<link|<img|\ssrc=|@import|url\(|fetch\(|XMLHttp|\bimport\b", page)
    assert re.findall(r'https?://[^"<\s]+', page) == ["https://arxiv.org/abs/2601.20745"]
