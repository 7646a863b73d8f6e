"""Stands for One2345PlusPlusPipeline of the installed package one2345pp (pip install one2345pp)."""

import one2345pp.models.condition_encoder
import one2345pp.models.elevation
import one2345pp.models.unet_occupancy
import one2345pp.models.unet_sparse
import one2345pp.schedulers.scheduling_log_snr
from one2345pp.pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline


__all__ = ["One2345PlusPlusPipeline"]
