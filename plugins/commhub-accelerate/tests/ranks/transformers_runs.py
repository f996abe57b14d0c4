"""What is done with the Trainer on each rank."""

import shutil
import unittest.mock

import commhub_accelerate.transformers
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import commhub
from commhub.testing._recorded import Recorder

STEPS = 8
OWN = {"ddp_find_unused_parameters": None, "ddp_bucket_cap_mb": None}
HOOKS = {
    "powersgd": "powersgd(rank=1, start_step=1, min_compression_rate=1.0)",
    "quantize": "quantize_per_tensor",
}
DATA = [
    {"input_ids": torch.tensor([(7 * i + j * j) % 60 for j in range(8)]), "labels": torch.tensor(i % 2)}
    for i in range(48)
]


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


def lora():
    return get_peft_model(bert(), LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))


def trainer(folder, model=None, **more):
    settings = {
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "ddp_bucket_cap_mb": 0.002,
        "ddp_find_unused_parameters": False,
    }
    args = TrainingArguments(output_dir=str(folder), **(settings | more))
    return Trainer(bert() if model is None else model, args, train_dataset=DATA, eval_dataset=DATA[:4])


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def trainer_plain(me):
    made = trainer(me.folder / "t-plain")
    made.train()
    return weights(made)


def trainer_allreduce(me):
    """The hook's calls are those of DDP's buckets, in each of which it asks once."""
    made = trainer(me.folder / "t-allreduce")
    attached = commhub_accelerate.transformers.attach(made, "allreduce")
    before = attached.registration
    calls = []
    _observe(made, lambda bucket, _: calls.append((bucket.step, bucket.index)))
    made.train()
    found = {"weights": weights(made), "calls": calls, "buckets": buckets(made)}
    return {**found, "steps": attached.registration.step, "before": before}


def buckets(made):
    """How many buckets DDP has, as it says itself."""
    return len(made.model_wrapped._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(","))


def _observe(made, call):
    """Watch from the moment on at which the accelerator has prepared the model."""
    method = made._prepare_for_training

    def prepare(*args):
        result = method(*args)
        commhub.registration(made.model_wrapped).observe(call)
        return result

    made._prepare_for_training = prepare


def trainer_accumulation(me):
    found = {}
    for every in (1, 2):
        made = trainer(me.folder / "t-acc", max_steps=STEPS // every, gradient_accumulation_steps=every)
        attached = commhub_accelerate.transformers.attach(made, "fp16")
        calls = []
        made.training_step = unittest.mock.Mock(side_effect=made.training_step)
        _observe(made, lambda bucket, _, calls=calls: calls.append(bucket.index))
        made.train()
        found[every] = (made.training_step.call_count, attached.registration.step, len(calls), buckets(made))
    return found


def trainer_uninterrupted(me):
    found = {}
    for name, hook in HOOKS.items():
        folder = me.folder / f"t-{name}"
        made = trainer(folder, save_strategy="steps", save_steps=2, save_total_limit=2)
        attached = commhub_accelerate.transformers.attach(made, hook)
        recorder = Recorder()
        made.train()
        folders = sorted(path.name for path in folder.iterdir())
        found[name] = {"weights": weights(made), "state": attached.registration.state_dict(), "folders": folders}
        found[name]["sent"] = attached.registration.stats.sent_bytes, recorder.sent_bytes(dist.get_world_size())
    return found


def trainer_lora(me):
    """With DDP as the Trainer sets it up by itself, which looks for unused parameters."""
    made = trainer(me.folder / "t-lora", lora(), save_strategy="steps", save_steps=4, **OWN)
    attached = commhub_accelerate.transformers.attach(made, "powersgd", rank=1, start_step=1, min_compression_rate=0.5)
    made.train()
    return {"weights": weights(made), "state": attached.registration.state_dict()}


def trainer_resumed(me):
    """From `checkpoint-6`, where the Trainer finds it by itself, and from a copy of it elsewhere."""
    found = {}
    for name, hook in HOOKS.items():
        for place in ("there", "elsewhere"):
            source = me.folder / f"t-{name}/checkpoint-6"
            if place == "elsewhere":
                source = me.folder / f"copied-{name}"
                if me.rank == 0:
                    shutil.copytree(me.folder / f"t-{name}/checkpoint-6", source)
                dist.barrier()
            made = trainer(me.folder / f"t-{name}-{place}")
            attached = commhub_accelerate.transformers.attach(made, hook)
            made.train(resume_from_checkpoint=str(source))
            found[name, place] = {"weights": weights(made), "state": attached.registration.state_dict()}
    return found


def trainer_lora_resumed(me):
    if me.rank == 0:
        shutil.rmtree(me.folder / "t-lora/checkpoint-8")
    dist.barrier()
    made = trainer(me.folder / "t-lora", lora(), **OWN)
    attached = commhub_accelerate.transformers.attach(made, "powersgd", rank=1, start_step=1, min_compression_rate=0.5)
    made.train(resume_from_checkpoint=True)
    return {"weights": weights(made), "state": attached.registration.state_dict()}


def trainer_overlap(me):
    found = {}
    for hook in ("allreduce", "optimizer_overlap"):
        made = trainer(me.folder / "t-overlap", max_grad_norm=0)
        commhub_accelerate.transformers.attach(made, hook)
        made.train()
        found[hook] = weights(made)
    return found


def trainer_compiled(me):
    settings = {"torch_compile": True, "torch_compile_backend": "eager", "ddp_bucket_cap_mb": 25}
    made = trainer(me.folder / "t-compiled", max_steps=2, **settings)
    attached = commhub_accelerate.transformers.attach(made, "powersgd_rank2(start_step=0)")
    made.train()
    torch.compiler.reset()
    return weights(made), type(made.model_wrapped).__name__, attached.registration.step


def trainer_twice(me):
    """A second train() goes on with the same model; a new model from model_init gets a hook of its own."""
    made = trainer(me.folder / "t-twice", max_steps=2)
    attached = commhub_accelerate.transformers.attach(made, "fp16")
    made.train()
    first = attached.registration
    made.evaluate()
    made.train()
    same = attached.registration is first, first.step
    made.model_init = bert
    made.train()
    return (*same, attached.registration is first, attached.registration.step)


def trainer_partial(me):
    """An optimizer that holds some of the parameters: the hook is registered late, and yet before its state is read."""
    steps = []
    for resume in (None, str(me.folder / "t-partial/checkpoint-2")):
        made = trainer(me.folder / "t-partial", max_steps=4, save_strategy="steps", save_steps=2)
        made.optimizer = torch.optim.SGD(made.model.classifier.parameters(), lr=0.1)
        attached = commhub_accelerate.transformers.attach(made, "fp16")
        made.train(resume_from_checkpoint=resume)
        steps.append(attached.registration.step)
    return steps


def trainer_new_accelerator(me):
    """As each trial of a search of hyperparameters makes one."""
    made = trainer(me.folder / "t-new", max_steps=2)
    attached = commhub_accelerate.transformers.attach(made, "fp16")
    made.create_accelerator_and_postprocess()
    made.train()
    return attached.registration.step


def trainer_refusals(me):
    found = {}

    def tried(case, call):
        try:
            call()
        except Exception as error:
            found[case] = (type(error).__name__, isinstance(error, commhub.CommhubError), str(error))

    attach = commhub_accelerate.transformers.attach
    made = trainer(me.folder / "t-refused", max_steps=1)
    tried("name", lambda: attach(made, "quantise_per_tensor"))
    tried("early", lambda: attach(made, "optimizer_overlap"))
    tried("early zero", lambda: attach(made, "zero_overlap"))
    tried("scaler", lambda: attach(made, "fp16", scaler=None))
    tried("no trainer", lambda: attach(bert(), "fp16"))
    found["untouched"] = sorted(key for key in vars(made) if callable(vars(made)[key]) and "checkpoint" in key)
    attach(made, "fp16")
    tried("twice", lambda: attach(made, "fp16"))
    made = trainer(me.folder / "t-refused", max_steps=1)
    made.evaluate()
    tried("evaluated", lambda: attach(made, "fp16"))
    made = trainer(me.folder / "t-refused", max_steps=1)
    attach(made, "fp16")
    made.evaluate()
    tried("evaluated first", made.train)
    return found


def trainer_found_by_the_core(me):
    made = trainer(me.folder / "t-core", max_steps=1)
    told = {}
    for case, model in {"trainer": made, "bert": bert(), "lora": lora()}.items():
        try:
            commhub.register(model, "fp16")
        except commhub.CommhubError as error:
            told[case] = str(error)
    attached = commhub_accelerate.transformers.attach(made, "fp16")
    made.train()
    return commhub.registration(made) is attached.registration, told


def trainer_alone(me):
    """In one process."""
    made = trainer(me.folder / "t-alone", max_steps=2, save_strategy="steps", save_steps=1)
    attached = commhub_accelerate.transformers.attach(made, "powersgd_rank2")
    made.train()
    made.train(resume_from_checkpoint=str(me.folder / "t-alone/checkpoint-1"))
    return me.said(), attached.registration


first = (
    trainer_plain,
    trainer_allreduce,
    trainer_accumulation,
    trainer_uninterrupted,
    trainer_lora,
    trainer_overlap,
    trainer_compiled,
    trainer_twice,
    trainer_partial,
    trainer_new_accelerator,
    trainer_refusals,
    trainer_found_by_the_core,
)
second = (trainer_resumed, trainer_lora_resumed)
single = (trainer_alone,)
