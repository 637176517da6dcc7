"""Overlays as DICOM Secondary Capture, `<image>.dNN.dcm`, by pydicom (the extra `dicom`): any viewer shows them.

Without `sources` they say nothing of a patient or a study, and lie in a study of their own. With it, patient, study and
the reference to the picture come from the source, which must be the file that was explained.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from detxai.errors import UsageError
from detxai.exports.content import Content, reported, verdict
from detxai.inputs.dicom import recognised
from detxai.output.records import DetectionRecord, Record

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
#: Required even where nothing is known; what a kept identity fills (PS3.3 C.7.1.1, C.7.2.1).
PATIENT = ("PatientName", "PatientID", "PatientBirthDate", "PatientSex")
STUDY = ("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName")


def files(content: Content) -> Iterator[tuple[str, bytes]]:
    """A file a reported box, of its first overlay. Raises UsageError without overlays, or for another source."""
    if find_spec("pydicom") is None:
        raise UsageError("DICOM needs pydicom.", "pip install 'detxai[dicom]', or export as heatmaps.")
    for record in content.records:
        source = None if content.sources is None else _source(content.sources, record)
        for d in reported(record):
            if d.attributions and d.attributions[0].overlay is None:
                raise UsageError(f"{record.image.path} #{d.id} has no overlay.", "Explain it again with overlays.")
            if d.attributions:
                yield f"{record.image.path}.d{d.id:02d}.dcm", _capture(content, record, d, source)


def _source(folder: Path, record: Record) -> Any:
    """The elements of the DICOM file that was explained; None for a picture of another kind. Raises UsageError."""
    import pydicom

    name, _, frame = record.image.path.rpartition("#")
    file = folder / (name if frame.isdecimal() and name else record.image.path)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UsageError(
            f"{file} cannot be read: {error.strerror}.", "Give the folder that was explained to --keep-identifiers."
        ) from error
    if hashlib.sha256(data).hexdigest() != record.image.sha256:
        raise UsageError(f"{file} is not the file that was explained.", "Explain it again, or leave the option out.")
    if not recognised(data[:132], file.suffix):
        return None
    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, force=True)


def _capture(content: Content, record: Record, d: DetectionRecord, source: Any) -> bytes:
    """The bytes of one Secondary Capture; the same record gives the same."""
    import pydicom
    from PIL import Image
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    overlay = str(d.attributions[0].overlay)
    with Image.open((content.folder / record.image.path).parent / overlay) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    mark = [record.image.path, str(record.image.sha256), hashlib.sha256(pixels.tobytes()).hexdigest(), overlay]
    made = pydicom.Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SpecificCharacterSet = "ISO_IR 192"
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = SECONDARY_CAPTURE
    made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=mark)
    made.StudyInstanceUID = generate_uid(entropy_srcs=[*mark[:2], "study"])
    made.SeriesInstanceUID = generate_uid(entropy_srcs=[*mark[:2], "series"])
    for name in (*PATIENT, *STUDY):
        setattr(made, name, "")
    if source is not None:
        _keep_identity(made, source)
    made.Modality, made.ConversionType, made.Manufacturer = "OT", "WSD", "detxai"
    made.SeriesNumber, made.InstanceNumber, made.SeriesDescription = None, d.id + 1, "why the detector reported it"
    made.ImageType = ["DERIVED", "SECONDARY"]
    said = f"{d.class_name} {d.score:.2f}, verdict {verdict(d) or 'none'}"
    made.ImageComments, made.DerivationDescription = said, f"attribution map, {d.attributions[0].method}"
    made.Rows, made.Columns, made.SamplesPerPixel = *pixels.shape[:2], 3
    made.PhotometricInterpretation, made.PlanarConfiguration, made.PixelRepresentation = "RGB", 0, 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 8, 8, 7
    made.PixelData = pixels.tobytes() + b"\0" * (pixels.size % 2)
    file = io.BytesIO()
    made.save_as(file, enforce_file_format=True)
    return file.getvalue()


def _keep_identity(made: Any, source: Any) -> None:
    """Patient, study and the reference to the picture, as the source has them."""
    import pydicom

    for name in ("StudyInstanceUID", *PATIENT, *STUDY):
        if source.get(name):
            setattr(made, name, str(source[name].value))
    if not ("SOPClassUID" in source and "SOPInstanceUID" in source):
        return
    reference = pydicom.Dataset()
    reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = source.SOPClassUID, source.SOPInstanceUID
    made.SourceImageSequence = [reference]
