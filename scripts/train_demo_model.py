"""Build the demo model `eabf-tiny` and its data `demo-long` from Debian packages, on a CPU or a GPU.

    python scripts/train_demo_model.py corpus    --work-dir build/demo
    python scripts/train_demo_model.py tokenizer --work-dir build/demo
    python scripts/train_demo_model.py train     --work-dir build/demo
    python scripts/train_demo_model.py data      --work-dir build/demo
    python scripts/train_demo_model.py card      --work-dir build/demo --model build/demo/model --history "..."

Each step keeps what it finds done, so a killed step is simply started again. `--init-from DIR` (for
`tokenizer` and `train`) continues from an existing checkpoint and takes over its tokenizer unchanged.
The sources and their licences are the table `SOURCES` in demo_corpus.py; `corpus` records them, with the
packages' versions and hashes, in `text/sources.json`.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from demo_corpus import SOURCES, build_corpus

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
PACKAGE_DATA = Path(__file__).resolve().parent.parent / "eabf_cli" / "demo"


def run_corpus(args: argparse.Namespace) -> None:
    for source in SOURCES:
        print(f"{source.name}: Debian {', '.join(source.packages)}; {source.licence}", file=sys.stderr)
    build_corpus(args.work_dir)


def run_tokenizer(args: argparse.Namespace) -> None:
    from demo_training import tokenize_corpus, train_tokenizer

    target = args.work_dir / "tokenizer"
    if not (target / "tokenizer.json").exists():
        if args.init_from is None:
            train_tokenizer(args.work_dir / "text", target)
        else:
            target.mkdir(parents=True, exist_ok=True)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(args.init_from / name, target / name)
    tokenize_corpus(args.work_dir / "text", target, args.work_dir / "tokens")


def run_train(args: argparse.Namespace) -> None:
    import torch
    from demo_rows import TextMixture
    from demo_training import TrainConfig, new_model, train
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(args.work_dir / "tokenizer")
    text = TextMixture.load(args.work_dir / "tokens")
    config = TrainConfig(
        steps=args.steps,
        warmup_steps=args.warmup_steps,
        decay_steps=args.decay_steps,
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        seed=args.seed,
        save_every=args.save_every,
        compile=not args.no_compile,
        bf16=args.bf16,
    )
    if args.init_from is None:
        model = new_model(len(tokenizer), args.seed)
    else:
        model = LlamaForCausalLM.from_pretrained(args.init_from, dtype=torch.float32)
    output = args.work_dir / "model"
    for log in train(model.to(args.device), tokenizer, text, config, output):
        if log["step"] % args.log_every == 0 or log["step"] == config.steps:
            clock = time.strftime("%H:%M:%S")
            print(
                f"{clock} step {log['step']}/{config.steps} loss {log['loss']:.3f} "
                f"lr {log['learning_rate']:.2e} {log['tokens_per_s']:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )
    for path in (args.work_dir / "tokenizer").iterdir():
        shutil.copyfile(path, output / path.name)


def run_data(args: argparse.Namespace) -> None:
    from demo_data import build_demo_long
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.work_dir / "tokenizer", model_max_length=1_000_000)
    build_demo_long(args.work_dir / "text", tokenizer, args.output, num_samples=args.samples, seed=args.seed)


def run_card(args: argparse.Namespace) -> None:
    from demo_card import data_card, measure, model_card

    if args.model is not None:
        for name in MODEL_FILES:
            shutil.copyfile(args.model / name, args.output / "eabf-tiny" / name)
    rows = measure(args.output / "eabf-tiny", args.passkey_trials)
    (args.output / "eabf-tiny" / "README.md").write_text(model_card(args.history, rows), encoding="utf-8")
    (args.output / "demo-long" / "README.md").write_text(data_card(), encoding="utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)

    def add(name: str, function, help_text: str) -> argparse.ArgumentParser:
        sub = steps.add_parser(name, help=help_text)
        sub.add_argument("--work-dir", type=Path, default=Path("build/demo"), help="where everything is kept")
        sub.set_defaults(function=function)
        return sub

    add("corpus", run_corpus, "download the packages and extract their text")
    tokenizer = add("tokenizer", run_tokenizer, "train the tokenizer and encode the corpus")
    train = add("train", run_train, "train the model")
    for sub in (tokenizer, train):
        sub.add_argument("--init-from", type=Path, help="continue from this checkpoint and its tokenizer")
    train.add_argument("--steps", type=int, default=6000)
    train.add_argument("--warmup-steps", type=int, default=150)
    train.add_argument("--decay-steps", type=int, default=2400)
    train.add_argument("--learning-rate", type=float, default=2e-3)
    train.add_argument("--batch-size", type=int, default=16)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--save-every", type=int, default=100)
    train.add_argument("--log-every", type=int, default=20)
    train.add_argument("--device", default="cpu")
    train.add_argument("--bf16", action="store_true", help="bf16 autocast (a GPU, or a CPU with AMX)")
    train.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    data = add("data", run_data, "write demo-long: training samples and held-out documents")
    data.add_argument("--samples", type=int, default=240)
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("-o", "--output", type=Path, default=PACKAGE_DATA / "demo-long")
    card = add("card", run_card, "measure the model and write the cards of model and data")
    card.add_argument("--model", type=Path, help="put this trained checkpoint into the package first")
    card.add_argument("--history", required=True, help="one or two sentences: how the weights came about")
    card.add_argument("--passkey-trials", type=int, default=25)
    card.add_argument("-o", "--output", type=Path, default=PACKAGE_DATA)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
