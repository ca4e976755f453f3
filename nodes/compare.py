"""Compare Sheet: what several people, or several levels, get for the same prompts, on one picture."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from .contact_sheet import NO_COLUMNS, draw_contact_sheet
from .schema import node_schema


class PSACompareSheet(io.ComfyNode):
    """Draws a labelled contact sheet and saves it as ComfyUI saves images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Images and labels in; the sheet out, and in the output folder."""
        return node_schema(
            ["PSA", "compare", "contact sheet", "grid", "side by side", "XY plot"],
            node_id="PSACompareSheet",
            display_name="Compare Sheet",
            description="Draws images as one labelled sheet, people or levels across and prompts down, and saves it "
            "in the output folder. What you write on it is in the picture and in the workflow.",
            inputs=[
                io.Image.Input("images", tooltip="All images of the first row, then those of the second, and so on."),
                io.String.Input(
                    "columns",
                    multiline=True,
                    default="",
                    tooltip="A label for each column, one a line: people or levels. Do not write names that should "
                    "stay private.",
                ),
                io.String.Input(
                    "rows",
                    multiline=True,
                    default="",
                    tooltip="A label for each row, one a line: prompts. Empty: one row without a label.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="psa/compare",
                    tooltip="Where the sheet goes in the output folder, and how its name begins.",
                ),
            ],
            outputs=[io.Image.Output("sheet", display_name="IMAGE", tooltip="The sheet.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, columns: str | None) -> bool | str:
        """Ask for labels before anything is sampled; where they are linked, they are None here."""
        return True if columns is None or _labels(columns) else NO_COLUMNS

    @classmethod
    def execute(cls, images: Tensor, columns: str, rows: str, filename_prefix: str) -> io.NodeOutput:
        """Draw the sheet and save it."""
        sheet = draw_contact_sheet(images, _labels(columns), _labels(rows))
        return io.NodeOutput(sheet, ui=ui.ImageSaveHelper.get_save_images_ui(sheet, filename_prefix, cls))


def _labels(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


NODES: list[type[io.ComfyNode]] = [PSACompareSheet]
