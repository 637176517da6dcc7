"""ParchGrad (Park, Jeon & Choi 2023): a gradient that keeps some channels. Delete this folder and the feature is gone.

Stands on models and attribution."""
