"""Publishes to and loads from a Hub that fails at every request in turn."""

import json
from itertools import product

from huggingface_hub.errors import HTTPError

from . import fixtures
from .forks import prepare, run_to_end
from .report import Row
from .scenarios import Scenario, differences, half_published, undisturbed

# (fault, whether it lasts from that request on); `faulty_hub.FaultyHub` describes them.
FAULTS = [(fault, False) for fault in ("cut", "lost", "half", "delay", "429", "500", "503")]
FAULTS += [("cut", True), ("503", True)]
REFUSED = 3  # exit code of a run that ended with a clear error


class Conversation(Scenario):
    """
    One command of a user, and its requests to the Hub.

    Attributes:
        name: name in the table.
        is_upload: whether it publishes. It then begins with an empty Hub, otherwise with a full one.
        errors: types of errors that are clear, if they have a message.
    """

    is_upload = False
    errors = (OSError, ValueError)

    def reset(self):
        super().reset()
        self.hub.control("clear" if self.is_upload else "restore")

    def run(self):
        """Runs the command, and writes its answer to a file. Returns `REFUSED` if it ends with a clear error."""
        shorten_waits()
        try:
            answer = self.speak()
        except self.errors as error:
            print(f"{type(error).__name__}: {error}")
            return REFUSED if str(error).strip() else 1
        (self.output / "answer.json").write_text(json.dumps(answer))
        return 0

    def speak(self):
        """Runs the command; returns the answer, which must equal that of an undisturbed run."""
        raise NotImplementedError

    def result(self):
        """The answer, and the published files."""
        answer = (self.output / "answer.json").read_text()
        repositories = self.hub.control("look")["repositories"]
        return {"answer": answer, **{name: commits[-1] for name, commits in repositories.items()}}


class PublishModel(Conversation):
    name = "publishing a model"
    is_upload = True

    def speak(self):
        from transformers import pipeline

        import emoshare  # noqa: F401  (registers the task)

        pipeline("emotion-share", model=str(self.place / "model")).push_to_hub("org/model", private=True)


class PublishCorpus(Conversation):
    name = "publishing a corpus"
    is_upload = True

    def speak(self):
        from emoshare.dataset_script.__main__ import main

        main(["--config", "csv", "--data_dir", str(self.place / "corpus"), "--push_to_hub", "org/corpus"])


class LoadModel(Conversation):
    name = "loading a model, EmoShare installed"

    errors = (OSError, ValueError, HTTPError)  # HTTPError of the Hub's client passes through Transformers

    def speak(self):
        import emoshare  # noqa: F401

        return self.predict()

    def predict(self):
        from transformers import pipeline

        clip = str(self.place / "corpus" / "wav" / "train_00000.wav")
        return pipeline("emotion-share", model="org/model", trust_remote_code=True)(clip)


class LoadRemoteCode(LoadModel):
    name = "loading a model with its code"

    def speak(self):
        import sys

        sys.modules["emoshare"] = None
        return self.predict()


class LoadHeads(Conversation):
    name = "loading heads, and their backbone"

    def speak(self):
        import torch

        from emoshare import EmoShareModel

        model = EmoShareModel.from_pretrained("org/heads").eval()
        return model(torch.ones(1, 4000)).logits.tolist()


class LoadCorpus(Conversation):
    name = "loading a corpus"

    def speak(self):
        from emoshare.dataset_script import load_corpus

        corpus = load_corpus("org/corpus")
        audio = [len(row["audio"]["bytes"]) for row in corpus.splits["train"]]
        return [corpus.labels, corpus.facts, corpus.shares("devel").tolist(), audio]


CONVERSATIONS = (PublishModel, PublishCorpus, LoadModel, LoadRemoteCode, LoadHeads, LoadCorpus)


def shorten_waits():
    """Makes the Hub's client wait for hundredths of seconds instead of seconds before it retries."""
    import time

    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, 0.01))


def fill(place, hub, log):
    """Publishes everything that later commands load."""
    hub.control("clear")
    for conversation in (PublishModel(place, hub), PublishCorpus(place, hub)):
        Scenario.reset(conversation)
        prepare(conversation.run, log)
    Scenario.reset(conversation)
    prepare(lambda: fixtures.publish_heads(place), log)
    hub.control("save")


def fail_at_each_request(conversation, most, log):
    """
    Repeats a conversation with the Hub, which fails at each request in turn, in each way. If the command ends with an
    error, it is run again in the same place, without a fault.

    Args:
        conversation: `Conversation`.
        most: fail at this many requests at most, the first ones.
        log: file for the output of runs.

    Returns:
        `Row`.
    """
    expected, _ = undisturbed(conversation, log)
    conversation.reset()
    conversation.hub.control("arm")
    run_to_end(conversation.run, log)
    requests = conversation.hub.control("look")["count"]
    row, survived, refused = Row(f"the Hub fails, {conversation.name}"), 0, 0
    for at, (fault, lasts) in product(range(1, min(requests, most) + 1), FAULTS):
        conversation.reset()
        conversation.hub.control("arm", fault=fault, at=at, lasts=lasts)
        title = f"{fault} at request {at} of {requests}{' and after it' if lasts else ''}"
        run = run_to_end(conversation.run, log)
        conversation.hub.control("arm")
        if run.code not in (0, REFUSED):
            row.fail(f"{title}: ended with {run.code}:\n{run.output()}")
        for problem in half_published(conversation.hub, expected):
            row.fail(f"{title}: {problem}")
        refused += run.code != 0
        survived += run.code == 0
        if run.code != 0:
            run = run_to_end(conversation.run, log)
        if run.code != 0:
            row.fail(f"{title}: the next try ended with {run.code}:\n{run.output()}")
        elif (result := conversation.result()) != expected:
            row.fail(f"{title}: {differences(expected, result)}")
        row.trials += 1
    row.note = f"{requests} requests; {survived:,} ended well at once, {refused:,} with an error and then well"
    return row
