"""CVAT for images 1.1: `annotations.xml`, boxes with score, verdict and reason as attributes.

See https://docs.cvat.ai/docs/dataset_management/formats/format-cvat. Labels must be those of the CVAT task.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree as Xml

from detxai.exports.content import Content, reason, reported, size, verdict
from detxai.output.records import DetectionRecord
from detxai.text import xml_text
from detxai.vocabulary import VERDICTS

#: Attribute of a box -> (kind of input, what CVAT offers).
ATTRIBUTES = {"score": ("text", ""), "verdict": ("select", "\n".join((*VERDICTS, "none"))), "reason": ("text", "")}


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """The one file of all records."""
    root = Xml.Element("annotations")
    _text(root, "version", "1.1")
    task = Xml.SubElement(Xml.SubElement(root, "meta"), "task")
    for name, value in (("name", "detxai"), ("size", str(len(content.records))), ("mode", "annotation")):
        _text(task, name, value)
    labels = Xml.SubElement(task, "labels")
    for name in sorted({d.class_name for record in content.records for d in reported(record)}):
        _label(labels, name)
    for number, record in enumerate(content.records):
        width, height = size(record)
        named = {"id": str(number), "name": xml_text(record.image.path)}
        image = Xml.SubElement(root, "image", named | {"width": str(width), "height": str(height)})
        for d in reported(record):
            _box(image, d)
    Xml.indent(root)
    yield "annotations.xml", Xml.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _text(parent: Xml.Element, tag: str, text: str, **attributes: str) -> None:
    Xml.SubElement(parent, tag, attributes).text = xml_text(text)


def _label(labels: Xml.Element, name: str) -> None:
    label = Xml.SubElement(labels, "label")
    _text(label, "name", name)
    attributes = Xml.SubElement(label, "attributes")
    for attribute, (kind, values) in ATTRIBUTES.items():
        one = Xml.SubElement(attributes, "attribute")
        default = values.rpartition("\n")[2]
        for tag, text in (("name", attribute), ("mutable", "False"), ("input_type", kind), ("default_value", default)):
            _text(one, tag, text)
        _text(one, "values", values)


def _box(image: Xml.Element, d: DetectionRecord) -> None:
    edges = zip(("xtl", "ytl", "xbr", "ybr"), d.box, strict=True)
    place = {name: f"{value:.2f}" for name, value in edges}
    named = {"label": xml_text(d.class_name), "source": "auto", "occluded": "0", "z_order": "0"}
    box = Xml.SubElement(image, "box", named | place)
    for name, value in (("score", f"{d.score:.6g}"), ("verdict", verdict(d) or "none"), ("reason", reason(d) or "")):
        _text(box, "attribute", value, name=name)
