"""What a plan file holds, in words and with units."""

from batchjax.report.sharing import node_names, PlanFile, SharedNode

# Numbers and strings of a plan file, in words with their units; others are shown under their names.
_WORDS = {
    "num_pages": ("KV pool", "{:,} pages"),
    "shared_nodes": ("Prefixes shared by several rows", "{:,}"),
    "decode_tokens_at_most": ("Tokens to draw, at most", "{:,}"),
    "predicted_secs": ("Predicted time in steps, at least", "{:,.1f} s"),
    "predicted_ladder_secs": ("Of it, for shapes that like jobs share", "{:,.1f} s"),
    "predicted_padding_waste": ("Predicted padding", "{:.1%} of launched tokens"),
    "predicted_mixed_steps": ("Predicted mixed steps", "{:,}"),
    "predicted_decode_loops": ("Predicted decode loops", "{:,}"),
    "predicted_peak_pages": ("Predicted peak of the KV pool", "{:,} pages"),
}
_MOST_PREFIXES = 12


def rows(plan: PlanFile) -> list[tuple[str, str]]:
  """The plan's settings and shapes in words."""
  found = []
  for name, value in plan.settings.items():
    words, form = _WORDS.get(name, (name, "{}"))
    found.append((words, form.format(value) if isinstance(value, (int, float)) else str(value)))
  for bucket in plan.buckets:
    kind = {"mixed": "Shape of mixed steps", "decode": "Shape of decode loops"}.get(
        bucket.get("kind"), "Shape")
    sizes = [f"{value:,} {name}" if isinstance(value, int) else f"{name} {value}"
             for name, value in bucket.items() if name != "kind"]
    found.append((kind, ", ".join(sizes)))
  return found


def prefixes(plan: PlanFile) -> list[tuple[str, SharedNode]]:
  """The prefixes that save most, with their names."""
  named = list(zip(node_names(plan.nodes), plan.nodes))
  return sorted(named, key=lambda item: -item[1].saved_tokens)[:_MOST_PREFIXES]
