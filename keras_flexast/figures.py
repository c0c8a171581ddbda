"""Pictures of results, as PNG files."""

import io

from keras_flexast.runs import write_whole


def accuracy_figure(curves, path, title, metric="accuracy"):
    """Draw a metric against the patch size, one line a model: FlexiAST's Figure 1.

    Args:
        curves: {model name: {patch size: value between 0 and 1}}.
        path: of the PNG.
        title: above the axes.
        metric: name of the value.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    names = list(next(iter(curves.values())))
    for (label, curve), marker in zip(curves.items(), "so^v", strict=False):
        values = [100 * value for value in curve.values()]
        axes.plot(range(len(names)), values, marker=marker, label=label)
        axes.annotate(
            f"{values[-1]:.1f}", (len(names) - 1, values[-1]), (6, -3), textcoords="offset points"
        )
    axes.set_xticks(range(len(names)), [str(name) for name in names])
    axes.set(xlabel="patch size (mel bins x frames)", ylabel=f"{metric} (%)", title=title)
    axes.set(ylim=(0, 104), xlim=(-0.3, len(names) - 0.3))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_whole(path, content.getvalue())
