"""One file a family of heads; `detxai.models.detectors.HEADS` names them."""
