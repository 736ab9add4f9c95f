"""Draws results.jsonl as loss.svg: plot.py, beside it."""
import json, pathlib, statistics

HERE = pathlib.Path(__file__).parent
COLOURS = {"ternary": "#c2410c", "none": "#1d4ed8"}
NAMES = {"ternary": "ternary", "none": "full precision"}


def main():
    lines = [json.loads(line) for line in open(HERE / "results.jsonl")]
    sizes = ["1m", "4m", "12m"]
    loss = {}
    for line in lines:
        loss.setdefault(line["run"], []).append(line["val_loss"]["600"])
    shown = [value for size in sizes for kind in COLOURS for value in loss.get(f"{size} {kind}", [])]
    low, high = min(shown) - 0.05, max(shown) + 0.05
    x = {size: 110 + 160 * i for i, size in enumerate(sizes)}
    y = lambda value: 30 + 240 * (high - value) / (high - low)
    parts = []
    steps = [round(low + (high - low) * i / 4, 2) for i in range(5)]
    for value in steps:
        parts.append(f'<path d="M60 {y(value):.1f}H500" stroke="#ddd"/>')
        parts.append(f'<text x="52" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
    for size in sizes:
        parts.append(f'<text x="{x[size]}" y="292" text-anchor="middle">{size}</text>')
    for i, (kind, colour) in enumerate(COLOURS.items()):
        shift = 14 * i - 7
        means = [(x[size] + shift, statistics.mean(loss[f"{size} {kind}"]))
                 for size in sizes if f"{size} {kind}" in loss]
        path = "L".join(f"{at} {y(value):.1f}" for at, value in means)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for size in sizes:
            for value in loss.get(f"{size} {kind}", []):
                parts.append(f'<circle cx="{x[size] + shift}" cy="{y(value):.1f}" r="3.5" fill="{colour}"/>')
        parts.append(f'<text x="380" y="{40 + 18 * i}" fill="{colour}">{NAMES[kind]}</text>')
    parts.append('<text x="60" y="18">held-out loss in nats after 600 steps; a dot is a seed, lines join means</text>')
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 520 305" font-family="sans-serif" font-size="12">'
    (HERE / "loss.svg").write_text(head + '<rect width="520" height="305" fill="white"/>' + "".join(parts) + "</svg>\n")


if __name__ == "__main__":
    main()
