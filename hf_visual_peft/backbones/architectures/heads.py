"""Task heads of larger models around a backbone: what a new task needs anew.

Of segmentation and depth models that is the decoder, of detectors and mask transformers what tells the classes (and
boxes): their own transformers are pretrained, and who wants to train them names them in `modules_to_save`.
"""

# by their parts: peft finds modules by how their names end, and many a name ends in "neck" or "head"
_DPT = ("neck.reassemble_stage", "neck.convs.*", "neck.fusion_stage", "head.head")

_RT_DETR = ("model.enc_score_head", "model.decoder.class_embed.*", "model.decoder.bbox_embed.*")

HEADS = {
    "SegformerForSemanticSegmentation": ("decode_head",),
    "UperNetForSemanticSegmentation": ("decode_head", "auxiliary_head"),
    "BeitForSemanticSegmentation": ("fpn", "decode_head", "auxiliary_head"),
    "Data2VecVisionForSemanticSegmentation": ("fpn", "decode_head", "auxiliary_head"),
    "DPTForDepthEstimation": _DPT,
    "DPTForSemanticSegmentation": (*_DPT, "auxiliary_head"),
    "MaskFormerForInstanceSegmentation": ("class_predictor",),
    "Mask2FormerForUniversalSegmentation": ("class_predictor",),
    "DetrForObjectDetection": ("class_labels_classifier", "bbox_predictor"),
    "DeformableDetrForObjectDetection": ("class_embed.*", "bbox_embed.*"),
    "ConditionalDetrForObjectDetection": ("class_labels_classifier", "bbox_predictor"),
    "TableTransformerForObjectDetection": ("class_labels_classifier", "bbox_predictor"),
    "RTDetrForObjectDetection": _RT_DETR,
    "RTDetrV2ForObjectDetection": _RT_DETR,
    "DFineForObjectDetection": _RT_DETR,
    "OwlViTForObjectDetection": ("class_head", "box_head"),
    "Owlv2ForObjectDetection": ("class_head", "box_head"),
    "CLIPSegForImageSegmentation": ("decoder",),
    "ShieldGemma2ForImageClassification": (),  # it reads its answer off words
}
