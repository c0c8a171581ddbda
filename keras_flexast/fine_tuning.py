"""Training a part of a model: a frozen encoder, or low-rank changes of it."""


def tune_part(model, settings):
    """Make only that part of a PackedAST trainable which the settings name.

    Args:
        model: PackedAST, not compiled yet.
        settings: TrainSettings, of which `frozen` and `lora_rank` count.
    """
    if settings.frozen:
        model.backbone.trainable = False
    if settings.lora_rank:
        for block in model.backbone.blocks:
            attention = block.self_attention
            for dense in (attention.query_dense, attention.value_dense, attention.output_dense):
                dense.enable_lora(settings.lora_rank)
        for variable in model.backbone.variables:
            if not variable.name.startswith("lora_"):
                variable.trainable = False
