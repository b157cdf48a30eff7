"""
The demo: a page that shows which share of listeners would perceive each emotion in a clip, and when.

    python app.py                              the model that `make train` leaves in outputs/demo
    python app.py MODEL                        another one, a folder or a Hub id
    EMOSHARE_MODEL=MODEL python app.py         the same, as in a Hugging Face Space: see docs/demo.md

The page is only reachable from this machine unless GRADIO_SERVER_NAME says otherwise, and loads nothing from elsewhere.
A model repository contains its own code, so this file needs gradio, altair and what the pipeline needs, but no other
file of this project. Clips in a folder `examples` next to it are offered as examples.
"""

import os
import re
import sys
import warnings
from base64 import b64decode
from collections import deque
from html import escape
from pathlib import Path
from threading import Lock

import altair
import gradio
import numpy as np
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers import pipeline

HERE = Path(__file__).resolve().parent
TRAINED_HERE = HERE / "outputs" / "demo"
CLEANING_SECONDS = 1800  # how often clips are deleted that are older than this
# The longest and largest clip that the page accepts. A small file may be hours of silence, so both are limited.
MAX_MINUTES = 10
MAX_MEGABYTES = 100
TIME_STEPS = 250  # most steps that a chart draws, however long the clip is
LISTENERS = 20  # size of the panels that the intervals are for
MAX_WRITTEN_WINDOWS = 6  # a timeline with more windows has no room for numbers
LIVE_HOP_SECONDS = 1.0  # from one estimate to the next while somebody speaks
LIVE_SECONDS = 60  # length of the live timeline
MOST_SECONDS_BEHIND = 3  # if the shares are later than this, the page says that the machine is too slow
LIVE_CHARTS = {
    "live_shares": "## Shares of the last second",
    "live_timeline": "## The last minute",
}
CHUNK_SECONDS = 0.5  # shortest audio that the browser sends at a time
# Python's warning filters belong to the process, not to a thread, so only one thread at a time may change them.
CATCHING_WARNINGS = Lock()

FONTS = ["Helvetica Neue", "Arial", "sans-serif"]
BLUE, ORANGE = "#2166ac", "#e08214"
# The results are next to the limits on a wide screen, and above them on a narrow one.
CSS = """
#live {display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr)}
@media (max-width: 900px) {#live {grid-template-columns: minmax(0, 1fr)}}
#parts {display: grid; grid-template: "clip results" auto "limits results" 1fr / minmax(0, 2fr) minmax(0, 3fr)}
#clip {grid-area: clip} #results {grid-area: results} #limits {grid-area: limits}
@media (max-width: 900px) {#parts {grid-template: "clip" "results" "limits" / minmax(0, 1fr)}}
[role=alert]:not(:empty) {border-left: 4px solid #b2182b; padding: 0.5em 1em}
#microphone button {background: var(--button-primary-background-fill); color: var(--button-primary-text-color)}
.vega-embed {width: 100%}
.vega-embed .mark-rect path {shape-rendering: crispEdges}
.vega-embed :is(.role-axis, .role-legend) text, :is(#shares, #live_shares) text {fill: var(--body-text-color)}
"""

INTRODUCTION = """
# Which emotions would listeners perceive?

For a clip of speech, a model estimates **the share of listeners who would perceive each emotion** in the voice. A clip
has many shares at once, and they need not add up to 100%. None of them says what the speaker feels.
"""
SYNTHETIC = """
⚠️ **This model was trained on synthetic voices and simulated listeners.** It shows that the software works; its
shares for a real voice mean nothing.
"""
NO_CARD = """
⚠️ **This model has no card**: it is not known what it was trained on, how good it is, and what its limits are.
"""
INTERVALS = """
The lines show how certain the shares are: 90% of panels of {listeners} listeners would show a share within them.
"""
ATTENTION = """
## Where the model listened
The clip's waveform, and the model's attention for each emotion: the darker, the more that moment counts for the share.
"""
TIMELINE = """
## Shares over time
The clip is longer than the model can hear at once. These are the shares of its parts; those above are their average.
"""
LIVE = f"""
Speak, and see the shares of the last second, once a second. The model hears up to {{seconds:g}} seconds before it, too.
What you say is not kept. A recording may last {MAX_MINUTES} minutes.
"""
MICROPHONE = '<button class="lg">Speak</button> <span role="alert"></span>'
# Gradio's own microphone drops audio that was not fetched before the next piece came. This one waits for an answer to
# each piece of audio, and then sends everything recorded since.
MICROPHONE_JS = f"""
const button = element.querySelector("button"), alert = element.querySelector("span");
const worklet = `registerProcessor("listener", class extends AudioWorkletProcessor {{
    process([[samples]]) {{ if (samples) this.port.postMessage(samples); return true; }}
}})`;
let input = null, context = null, source = null, listener = null;  // browsers drop nodes that nothing refers to
let pending = [], number = 0, isFirst = true, isLast = false, isWaiting = false;

async function start() {{
    const audio = {{echoCancellation: false, noiseSuppression: false, autoGainControl: false}};
    input = await navigator.mediaDevices.getUserMedia({{audio}});
    context = new AudioContext();
    await context.audioWorklet.addModule(URL.createObjectURL(new Blob([worklet], {{type: "text/javascript"}})));
    listener = new AudioWorkletNode(context, "listener", {{channelCount: 1, channelCountMode: "explicit"}});
    [pending, isFirst, isLast, button.textContent] = [[], true, false, "Stop"];
    listener.port.onmessage = ({{data}}) => {{ if (input) {{ pending.push(data); send(); }} }};
    source = context.createMediaStreamSource(input);
    source.connect(listener);
}}

function stop() {{
    input.getTracks().forEach(track => track.stop());
    context.close();
    [input, isLast, button.textContent] = [null, true, "Speak"];
    send();
}}

function send() {{
    const length = pending.reduce((sum, samples) => sum + samples.length, 0);
    if (isWaiting || (!isLast && (!input || length < {CHUNK_SECONDS} * context.sampleRate))) return;
    const values = pending.flatMap(samples => [...samples]);
    const samples = Int16Array.from(values, value => Math.max(-1, Math.min(1, value)) * 32767);
    const bytes = Array.from(new Uint8Array(samples.buffer), byte => String.fromCharCode(byte)).join("");
    const sampling_rate = context.sampleRate;
    number += 1;
    trigger("heard", {{number, samples: btoa(bytes), sampling_rate, is_first: isFirst, is_last: isLast}});
    [pending, isFirst, isLast, isWaiting] = [[], false, false, true];
}}

watch("value", () => {{
    isWaiting = false;
    if (props.value.endsWith("stop")) pending = [];
    input && props.value.endsWith("stop") ? stop() : send();
}});
button.onclick = async () => {{
    [alert.textContent, button.disabled] = ["", true];
    try {{ input ? stop() : await start(); }} catch (error) {{ alert.textContent = error.message; }}
    button.disabled = false;
}};
"""


def main(arguments):
    name = arguments[0] if arguments else os.environ.get("EMOSHARE_MODEL", str(TRAINED_HERE))
    if name == str(TRAINED_HERE) and not TRAINED_HERE.is_dir():
        sys.exit(
            f"no model in {TRAINED_HERE}: run `make train` first, or name another one (python app.py MODEL, or "
            "EMOSHARE_MODEL=MODEL in the environment)"
        )
    try:
        emotion_share = pipeline("emotion-share", model=name, trust_remote_code=True)
        card = load_card(name)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        is_remote = isinstance(error, OSError) and not Path(name).is_dir()
        sys.exit(f"no model {name}: {'no such folder here, and from the Hub: ' if is_remote else ''}{reason(error)}")
    theme = gradio.themes.Default(primary_hue="blue", font=FONTS, font_mono=["monospace"])
    page(emotion_share, card).launch(
        share=False,
        run_history=False,
        footer_links=[],
        theme=theme,
        css=CSS,
        max_file_size=f"{MAX_MEGABYTES}mb",
    )


def reason(error):
    """An error's reason, in one line. Transformers' loaders put tracebacks into messages; the last has the reason."""
    raised = re.findall(r"^\w+Error: (.+)", str(error), re.MULTILINE)
    return raised[-1] if raised else str(error).partition("\n")[0]


def load_card(name):
    """The card of a model folder or repository, or None if it has none. Raises ValueError if it cannot be read."""
    path = Path(name) / "README.md"
    try:
        if Path(name).is_dir():
            return ModelCard.load(path) if path.is_file() else None
        return ModelCard.load(name)
    except EntryNotFoundError:
        return None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"its card (README.md) cannot be read: {reason(error)}") from error


def page(emotion_share, card):
    """
    Args:
        emotion_share: the "emotion-share" pipeline.
        card: the `ModelCard` of its model, or None.

    Returns:
        `gradio.Blocks`.
    """
    examples = sorted((HERE / "examples").glob("*.*"))
    cleaning = (CLEANING_SECONDS, CLEANING_SECONDS)
    with gradio.Blocks(title="EmoShare", analytics_enabled=False, delete_cache=cleaning) as blocks:
        gradio.Markdown(INTRODUCTION + warning(card))
        with gradio.Tab("A clip"), gradio.Row(elem_id="parts"):
            with gradio.Column(elem_id="clip"):
                clip = gradio.Audio(type="filepath", label="A clip of speech", buttons=[])
                gradio.Markdown(
                    f"A clip may have up to {MAX_MINUTES} minutes and {MAX_MEGABYTES} MB. It is deleted within an hour."
                )
                if examples:
                    labels = [example.stem for example in examples]
                    gradio.Examples([[str(example)] for example in examples], clip, example_labels=labels)
            with gradio.Column(elem_id="results"):

                @gradio.render(inputs=clip, concurrency_limit=1)
                def results(path):
                    show_results(emotion_share, path)

            with gradio.Column(elem_id="limits"):
                gradio.Markdown(limits(card))
        if hasattr(emotion_share, "stream"):  # models of earlier versions bring code without it
            with gradio.Tab("Live"):
                live(emotion_share, card)
    return blocks


def live(emotion_share, card):
    """Puts a microphone on the page, and charts of the shares while somebody speaks."""
    heard = gradio.State()  # for each visitor, what `listen` last returned
    one_at_a_time = Lock()
    with gradio.Row(elem_id="live"):
        with gradio.Column():
            microphone = gradio.HTML(
                "", html_template=MICROPHONE, js_on_load=MICROPHONE_JS, elem_id="microphone", padding=False
            )
            gradio.Markdown(LIVE.format(seconds=emotion_share.feature_extractor.chunk_length_s - LIVE_HOP_SECONDS))
            gradio.Markdown(limits(card))
        with gradio.Column():
            problem = gradio.HTML()
            plots = []
            for name, title in LIVE_CHARTS.items():
                gradio.Markdown(title)
                plots.append(gradio.Plot(elem_id=name, show_label=False, container=False))

    def draw(heard, event: gradio.EventData):
        number = event._data["number"]  # the number of the piece; the browser waits for it to change
        try:
            with one_at_a_time:
                heard, problem, *charts = listen(emotion_share, heard, event._data)
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            problem = alert_html("The recording has ended.", str(error) or type(error).__name__)
            return heard, f"{number} stop", problem, *[gradio.skip()] * len(LIVE_CHARTS)
        return heard, str(number), problem, *charts

    # The queue would open another connection for the answer to each piece; the browser waits for the answer anyway. By
    # default, Gradio would ignore a piece while it considers the one before it unanswered.
    microphone.heard(
        draw,
        heard,
        [heard, microphone, problem, *plots],
        show_progress="hidden",
        queue=False,
        trigger_mode="multiple",
    )


def listen(emotion_share, heard, piece):
    """
    Args:
        emotion_share: the pipeline.
        heard: what this function last returned for this recording: the stream and its last windows.
        piece: the next piece of the recording: `samples`, int16 in base64; `sampling_rate`; `is_first` and `is_last`.

    Returns:
        `heard`; an alert in HTML; and two charts, which stay unchanged if no further window is complete.
    """
    if piece["is_first"]:
        stream = emotion_share.stream(hop_length_s=LIVE_HOP_SECONDS, sampling_rate=piece["sampling_rate"])
        heard = stream, deque(maxlen=round(LIVE_SECONDS / LIVE_HOP_SECONDS))
    if heard is None:
        raise ValueError("The server has lost the recording so far; begin again.")
    stream, timeline = heard
    samples = np.frombuffer(b64decode(piece["samples"]), np.int16)
    if (timeline and timeline[-1]["end"] >= MAX_MINUTES * 60) or len(samples) > MAX_MINUTES * 60 * stream.sampling_rate:
        raise ValueError(f"A recording may last {MAX_MINUTES} minutes.")
    windows = stream.push(samples)
    if piece["is_last"]:
        with CATCHING_WARNINGS, warnings.catch_warnings(action="ignore"):  # about the level, which the alert reports
            windows += stream.finish()
    seconds, problem = len(samples) / stream.sampling_rate, stream.level.problem()
    alert = ""
    if problem is not None:
        alert = alert_html("Something may be wrong with the microphone.", f"What it hears {problem}")
    elif seconds > MOST_SECONDS_BEHIND:
        alert = alert_html("This machine is too slow.", f"The shares are {seconds:.0f} seconds behind.")
    if not windows:
        return heard, alert, *[gradio.skip()] * len(LIVE_CHARTS)
    timeline.extend(windows)
    shares = [{"label": label, "score": share} for label, share in windows[-1]["shares"].items()]
    return heard, alert, finished(shares_chart(shares)), finished(live_chart(timeline))


def warning(card):
    if card is None:
        return NO_CARD
    # Cards written by earlier versions have the sentence but not the tag.
    is_synthetic = "synthetic" in (card.data.tags or []) or "the corpus is synthetic" in card.text
    return SYNTHETIC if is_synthetic else ""


def limits(card):
    """The section "Limits" of the card."""
    sections = card.text.split("\n## ") if card else []
    return "".join(f"## {section}" for section in sections if section.startswith("Limits\n"))


def show_results(emotion_share, path):
    """Puts the shares of a clip on the page, or the reason why the clip cannot be used."""
    if path is None:
        gradio.Markdown("Upload or record a clip, or choose an example: its shares appear here.")
        return
    config = emotion_share.model.config
    # Models of earlier versions have a configuration without this property.
    has_attention = getattr(config, "has_attention", config.architecture == "cnn_lstm_attention")
    options = {"return_timeline": True, "return_attention": has_attention}
    has_intervals = getattr(config, "has_concentrations", False)
    if has_intervals:
        options |= {"return_interval": True, "listeners": LISTENERS}
    sampling_rate = emotion_share.feature_extractor.sampling_rate
    try:
        with CATCHING_WARNINGS, warnings.catch_warnings(record=True) as problems:
            warnings.simplefilter("always", UserWarning)
            waveform = hear(emotion_share, path)
        # This repeats the warnings, in the server's log. It runs without the lock, so that others need not wait for it.
        clip = {"array": waveform, "sampling_rate": sampling_rate, "path": path}
        result = emotion_share(clip, **options)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        alert("This clip cannot be used.", str(error) or type(error).__name__, path)
        return

    for problem in dict.fromkeys(str(problem.message) for problem in problems):
        alert("Something may be wrong with this clip.", problem, path)
    seconds = len(waveform) / sampling_rate
    ranking = [share["label"] for share in result["shares"]]
    intervals = INTERVALS.format(listeners=LISTENERS) if has_intervals else ""
    gradio.Markdown("## Share of listeners who would perceive it" + intervals)
    show(shares_chart(result["shares"]), "shares")
    if has_attention:
        gradio.Markdown(ATTENTION)
    show(waveform_chart(waveform, seconds), "waveform")
    if has_attention:
        show(attention_chart(result["attention"], ranking, seconds), "attention")
    if len(result["timeline"]) > 1:
        gradio.Markdown(TIMELINE)
        show(timeline_chart(result["timeline"], ranking), "timeline")


def alert(headline, text, path):
    gradio.HTML(alert_html(headline, text.replace(path, Path(path).name)))  # do not show the server's folders


def alert_html(headline, text):
    return f'<p role="alert"><strong>{headline}</strong> {escape(text)}</p>'


def hear(emotion_share, path):
    """
    Decodes a clip with the pipeline's own code, and stops when it is longer than the page allows. The pipeline only
    warns about truncated files; the page refuses them.

    Returns:
        `np.ndarray`: (samples,) float32, at the sampling rate of the pipeline's feature extractor.

    Raises:
        ValueError: if the clip is too large, too long or truncated, and as the pipeline does.
    """
    if os.path.getsize(path) > MAX_MEGABYTES * 2**20:
        raise ValueError(f"{path}: is larger than {MAX_MEGABYTES} MB")
    sampling_rate = emotion_share.feature_extractor.sampling_rate
    audio_blocks = sys.modules[type(emotion_share).__module__].audio_blocks
    blocks, num_samples = [], 0
    for block in audio_blocks(path, sampling_rate):
        blocks.append(block)
        num_samples += len(block)
        if num_samples > MAX_MINUTES * 60 * sampling_rate:
            raise ValueError(f"{path}: lasts more than {MAX_MINUTES} minutes")
    return np.concatenate(blocks)


def show(chart, name):
    gradio.Plot(finished(chart), elem_id=name, show_label=False, container=False)


def finished(chart):
    return (
        chart.properties(width="container", autosize=altair.AutoSizeParams(type="fit", contains="padding"))
        # Screen readers can read the text of an SVG, and it takes the page's colours.
        .properties(usermeta={"embedOptions": {"renderer": "svg", "actions": False}})
        .configure(font=", ".join(FONTS), background="transparent")
        .configure_axis(labelFontSize=12, titleFontSize=12)
        .configure_axisY(minExtent=95, maxExtent=95)  # aligns the time axes of the charts
        .configure_legend(labelFontSize=12, titleFontSize=12)
        .configure_text(fontSize=12)
        .configure_view(stroke=None)
    )


def shares_chart(shares):
    rows = []
    for share in shares:
        low, high = share.get("interval", (share["score"],) * 2)
        rows.append({**share, "low": low, "high": high, "end": max(share["score"], high)})
    base = altair.Chart(altair.Data(values=rows), height=240).encode(
        altair.X("score:Q", title="share of listeners", axis=altair.Axis(format="%", grid=False)).scale(domain=(0, 1)),
        altair.Y("label:N", title="emotion", axis=altair.Axis(title=None), sort=None),
    )
    marks = base.mark_bar(color=BLUE)
    if any("interval" in share for share in shares):
        whiskers = base.mark_errorbar(color=ORANGE, ticks=True, thickness=2)
        marks += whiskers.encode(altair.X("low:Q", title="share of listeners"), altair.X2("high:Q"))
    marks += base.mark_text(align="left", dx=4).encode(altair.X("end:Q"), altair.Text("score:Q", format=".1%"))
    room = {"left": 5, "top": 5, "right": 45, "bottom": 5}  # for the number behind a full bar
    return marks.properties(padding=room)


def waveform_chart(waveform, seconds):
    blocks = np.array_split(waveform, TIME_STEPS)
    ranges = [(float(block.min()), float(block.max())) for block in blocks]
    times = np.linspace(0, seconds, len(ranges)).tolist()
    values = [
        {"time": time, "lowest": lowest, "highest": highest}
        for time, (lowest, highest) in zip(times, ranges, strict=True)
    ]
    axis = altair.Axis(values=[0], labelExpr="'Waveform'", grid=False)
    return (
        altair.Chart(altair.Data(values=values), height=80)
        .mark_area(color="gray")
        .encode(time_axis("time:Q", seconds), altair.Y("lowest:Q", title=None, axis=axis), altair.Y2("highest:Q"))
    )


def attention_chart(attention, ranking, seconds):
    times = np.array(attention["time"])
    steps = np.array_split(np.arange(len(times)), min(TIME_STEPS, len(times)))
    centres = np.array([times[step].mean() for step in steps])
    edges = np.concatenate([[0], (centres[1:] + centres[:-1]) / 2, [seconds]])
    values = []
    for label in ranking:
        weights = np.array(attention[label]) * len(times)
        values += [
            {"emotion": label, "start": start, "end": end, "value": weights[step].mean()}
            for step, start, end in zip(steps, edges[:-1], edges[1:], strict=True)
        ]
    return heat_map(values, ranking, seconds, "attention (average of the clip: 1)", BLUE, ".1f")


def timeline_chart(timeline, ranking):
    cells = heat_map(
        timeline_cells(timeline, ranking), ranking, timeline[-1]["end"], "share of listeners", ORANGE, ".0%"
    )
    if len(timeline) > MAX_WRITTEN_WINDOWS:
        return cells
    shares = altair.Chart(cells.data).transform_calculate(middle="(datum.start + datum.end) / 2").mark_text()
    return cells + shares.encode(
        altair.X("middle:Q"),
        altair.Y("emotion:N", sort=ranking),
        altair.Text("value:Q", format=".0%"),
        color=altair.value("black"),
    )


def live_chart(timeline):
    """Like `timeline_chart`, for the last minute; the order of the emotions does not change."""
    end = max(timeline[-1]["end"], LIVE_SECONDS)
    ranking = list(timeline[-1]["shares"])
    return heat_map(
        timeline_cells(timeline, ranking), ranking, end, "share of listeners", ORANGE, ".0%", start=end - LIVE_SECONDS
    )


def timeline_cells(timeline, ranking):
    return [
        {"emotion": label, "start": window["start"], "end": window["end"], "value": window["shares"][label]}
        for window in timeline
        for label in ranking
    ]


def heat_map(values, ranking, end, title, color, number_format, start=0):
    """A heat map with emotions as rows and time as columns. `values` have `emotion`, `start`, `end` and `value`."""
    scale = altair.Scale(range=["white", color], interpolate="rgb", domainMin=0)
    legend = altair.Legend(orient="bottom", title=title, titleLimit=0, format=number_format)
    return (
        altair.Chart(altair.Data(values=values), height=300)
        .mark_rect(aria=False)  # screen readers should not read thousands of cells
        .encode(
            time_axis("start:Q", end, start),
            altair.X2("end:Q"),
            altair.Y("emotion:N", title=None, sort=ranking),
            altair.Color("value:Q", scale=scale, legend=legend),
            [altair.Tooltip("emotion:N"), altair.Tooltip("value:Q", title=title, format=number_format)],
        )
    )


def time_axis(field, end, start=0):
    axis = altair.Axis(title="time in seconds", grid=False)
    return altair.X(field, axis=axis, scale=altair.Scale(domain=[start, end], nice=False))


if __name__ == "__main__":
    main(sys.argv[1:])
