"""`detxai evaluate`: attribution methods judged on the user's own images, against baselines that keep them honest."""
