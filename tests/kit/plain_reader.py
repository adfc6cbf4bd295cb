"""A stranger's program: opens model folders with torch and transformers alone and writes their logits down. Knows nothing of sparsmith.

Called as `python -I plain_reader.py WORK`: reads WORK/request.json ([{name, folder, code}]) and WORK/inputs.safetensors, writes
WORK/answers.json and WORK/logits.safetensors.
"""

import json
import sys
from pathlib import Path

sys.modules["sparsmith"] = None  # an import of it would raise

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
work = Path(sys.argv[1])
inputs = load_file(work / "inputs.safetensors")
answers, logits = {}, {}
for one in json.loads((work / "request.json").read_text()):
    answer = answers.setdefault(one["name"], {})
    if one["code"]:
        try:
            transformers.AutoModelForCausalLM.from_pretrained(one["folder"], trust_remote_code=False)
            answer["opened without its code"] = True
        except (ValueError, KeyError, OSError):
            answer["opened without its code"] = False
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            one["folder"], dtype="auto", trust_remote_code=one["code"], output_loading_info=True
        )
    except Exception as fault:
        answer["fault"] = f"{type(fault).__name__}: {fault}"
        continue
    answer["class"], answer["module"] = type(model).__name__, type(model).__module__
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        answer[kind] = sorted(map(str, info.get(kind) or ()))
    with torch.no_grad():
        for name in ("plain", "padded right", "padded left"):
            mask = inputs.get(f"{name}/attention_mask")
            given = {} if mask is None else {"attention_mask": mask}
            out = model.eval()(input_ids=inputs[f"{name}/input_ids"], use_cache=False, **given).logits
            logits[f"{one['name']}/{name}"] = (out if mask is None else out[mask.bool()]).contiguous()
        greedy = model.generate(inputs["plain/input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
    logits[f"{one['name']}/greedy"] = greedy.contiguous()
answers["sparsmith was imported"] = any(name.startswith("sparsmith.") for name in sys.modules)
save_file(logits, work / "logits.safetensors")
(work / "answers.json").write_text(json.dumps(answers))
