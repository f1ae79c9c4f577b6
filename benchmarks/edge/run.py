"""Run exported models without PyTorch, for the edge benchmark; each call in a process of its own.

``python -m benchmarks.edge.run latency JOB``, ``... products JOB``, ``... throughput JOB``, ``...
memory JOB`` or ``... answers JOB``, with a job as JSON; prints what it measured as JSON.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray
from PIL import Image

from benchmarks.common.memory import peak_mb
from benchmarks.common.scores import image_metrics, scores_of_sizes

_BLOCK = 20  # runs in a row: what comes before a run changes what the caches hold


def latency(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds for one image, of each model in turns; ``configs`` may give one its own.

    ``fixed`` reshapes the models to the shape of the image.
    """
    configs, shape, compiled = job.get("configs", {}), [1, 3, *job["size"]], {}
    for name, path in job["models"].items():
        core = openvino.Core()
        model = core.read_model(path)
        if job.get("fixed"):
            model.reshape(shape)
        config = configs.get(name, job["config"])
        compiled[name] = core.compile_model(model, "CPU", config).create_infer_request()
    image = np.random.default_rng(0).random(shape, np.float32)
    return _in_turns(compiled, {name: [image] for name in compiled}, job["runs"])


def products(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the backbone, and of the product of all atoms with all patches of an image.

    An exact search cannot take less, so these bound what a whole model can take.
    """
    core, rng = openvino.Core(), np.random.default_rng(0)
    requests = {
        "bare": core.compile_model(job["bare"], "CPU", job["config"]).create_infer_request()
    }
    inputs = {"bare": [rng.random((1, 3, *job["size"]), np.float32)]}
    for name, scales in job["searched"].items():
        parameters, results, inputs[name] = [], [], []
        for width, number, atoms in scales:
            patches = openvino.opset8.parameter([width, number], np.float32)
            bank = openvino.opset8.constant(rng.random((atoms // 8 * 8, width), np.float32))
            # the least of each group, so that the product is made but need not be handed over
            product = openvino.opset8.matmul(bank, patches, transpose_a=False, transpose_b=False)
            groups = openvino.opset8.reshape(product, [atoms // 8, 8, number], special_zero=False)
            results.append(openvino.opset8.reduce_min(groups, 1))
            parameters.append(patches)
            inputs[name].append(rng.random((width, number), np.float32))
        model = openvino.Model(results, parameters)
        requests[name] = core.compile_model(model, "CPU", job["config"]).create_infer_request()
    return _in_turns(requests, inputs, job["runs"])


def _in_turns(
    requests: dict[str, Any], inputs: dict[str, list[NDArray[np.float32]]], runs: int
) -> dict[str, Any]:
    found: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(runs // _BLOCK):
        for name, request in requests.items():
            for run in range(-3, _BLOCK):
                start = perf_counter()
                request.infer(dict(enumerate(inputs[name])), share_inputs=True, share_outputs=True)
                if run >= 0:
                    found[name].append(1e3 * (perf_counter() - start))
    return {
        name: {"median_ms": statistics.median(times), "least_ms": min(times)}
        for name, times in found.items()
    }


def throughput(job: dict[str, Any]) -> dict[str, Any]:
    """Images a second of each model, one after the other and several at a time, in turns."""
    image = np.random.default_rng(0).random((1, 3, *job["size"]), np.float32)
    found: dict[str, dict[str, list[float]]] = {
        name: {"alone": [], "together": []} for name in job["models"]
    }
    core = openvino.Core()
    runs = {}
    for name, path in job["models"].items():
        alone = core.compile_model(path, "CPU", {**job["config"], "PERFORMANCE_HINT": "LATENCY"})
        many = core.compile_model(path, "CPU", {**job["config"], "PERFORMANCE_HINT": "THROUGHPUT"})
        runs[name] = (alone.create_infer_request(), openvino.AsyncInferQueue(many))
    for _ in range(job["runs"] // _BLOCK):
        for name, (request, queue) in runs.items():
            start = perf_counter()
            for _ in range(_BLOCK):
                request.infer([image], share_inputs=True, share_outputs=True)
            between = perf_counter()
            for _ in range(_BLOCK):
                queue.start_async([image])
            queue.wait_all()
            found[name]["alone"].append(_BLOCK / (between - start))
            found[name]["together"].append(_BLOCK / (perf_counter() - between))
    return {
        name: {
            **{way: statistics.median(rates) for way, rates in of.items()},
            "requests": len(runs[name][1]),
        }
        for name, of in found.items()
    }


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds, and peak memory above the runtime's own in MiB, loaded and after inference."""
    core = openvino.Core()
    parameter = openvino.opset8.parameter([1], np.float32)
    core.compile_model(openvino.Model([openvino.opset8.relu(parameter)], [parameter]), "CPU")(
        [np.zeros(1, np.float32)]
    )
    own = peak_mb()
    model = core.compile_model(job["model"], "CPU", job["config"])
    loaded = peak_mb()
    images = np.zeros(job["shape"], np.float32)
    model(images)
    found = {"runtime_mib": own, "loaded_mib": loaded - own, "inference_mib": peak_mb() - own}
    times = []
    for _ in range(5):
        start = perf_counter()
        model(images)
        times.append(1e3 * (perf_counter() - start))
    return {**found, "median_ms": statistics.median(times)}


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """How an exported model's answers differ from the reference, and its accuracy."""
    reference = np.load(job["reference"])
    predict = _predictor(Path(job["model"]), job["config"])
    maps, scores, labels = [], [], []
    for path in reference["paths"]:
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 255.0
        found = predict(_resized(image, job["size"]))
        maps.append(found["anomaly_map"].ravel())
        scores.append(float(found["pred_score"].ravel()[0]))
        labels.append(bool(found["pred_label"].ravel()[0]))
    anomaly_maps = np.concatenate(maps)
    score = np.array(scores)
    spread = float(np.ptp(reference["maps"]))
    labelled, good = np.array(labels), reference["kinds"] == "good"
    report = {
        "map_difference": float(np.abs(anomaly_maps - reference["maps"]).max() / spread),
        "score_difference": float(
            np.abs(score - reference["scores"]).max() / np.ptp(reference["scores"])
        ),
        "labels_changed": int((labelled != reference["labels"]).sum()),
        "images": len(score),
        "false_alarms": int((labelled & good).sum()),
        "good": int(good.sum()),
        "misses": int((~labelled & ~good).sum()),
        "defective": int((~good).sum()),
    }
    return (
        report
        | _accuracy(score, anomaly_maps, reference)
        | {
            f"reference_{name}": value
            for name, value in _accuracy(reference["scores"], reference["maps"], reference).items()
        }
    )


def _accuracy(scores: NDArray[Any], maps: NDArray[Any], reference: Any) -> dict[str, float]:  # noqa: ANN401
    found = {"image_AUROC": image_metrics(scores, reference["kinds"] != "good")["image_AUROC"]}
    if "masks" in reference:
        sizes = reference["sizes"]
        ends = np.cumsum(sizes.prod(axis=1))[:-1]
        masks = (
            mask.reshape(size)
            for mask, size in zip(np.split(reference["masks"], ends), sizes, strict=True)
        )
        pixels = scores_of_sizes(np.split(np.maximum(maps, 0.0), ends), list(masks))
        found |= {"AUPRO": pixels.aupro, "pixel_AP": pixels.average_precision}
    return found


def _resized(image: NDArray[np.float32], size: list[int] | None) -> NDArray[np.float32]:
    """Resized as the Engine does, for a model of one input size."""
    if size is None or list(image.shape[-2:]) == size:
        return image
    for axis, after in ((2, size[0]), (3, size[1])):
        before = image.shape[axis]
        step = before / after
        distance = np.abs(np.arange(before) + 0.5 - (np.arange(after)[:, None] + 0.5) * step) / max(
            step, 1.0
        )
        weights = np.maximum(1.0 - distance, 0.0)
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        image = np.moveaxis(np.moveaxis(image, axis, -1) @ weights.T, -1, axis)
    return image


def _predictor(
    path: Path, config: dict[str, str]
) -> Callable[[NDArray[np.float32]], dict[str, NDArray[Any]]]:
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        outputs = [output.name for output in session.get_outputs()]
        return lambda image: dict(
            zip(outputs, session.run(None, {session.get_inputs()[0].name: image}), strict=True)
        )
    model = openvino.Core().compile_model(path, "CPU", config)
    return lambda image: {
        name: value for output, value in model(image).items() for name in output.get_names()
    }


if __name__ == "__main__":
    steps = {step.__name__: step for step in (latency, products, throughput, memory, answers)}
    found = steps[sys.argv[1]](json.loads(sys.argv[2]))
    if "torch" in sys.modules:
        sys.exit("PyTorch was imported: the measurement is not what it says.")
    print(json.dumps(found))
