"""Architectures of all kinds, of which CI tries every one in every way."""

FAMILIES = {
    "decoders": (
        "LlamaForCausalLM",
        "BloomForCausalLM",
        "CamembertForCausalLM",  # has its head before the trunk
        "ElectraForCausalLM",  # transformers names no blocks
        "FalconForCausalLM",  # holds queries, keys and values in one
        "GPT2LMHeadModel",  # its linear layers are transposed
        "Gemma3ForCausalLM",
        "Gemma4ForCausalLM",  # its blocks have settings of their own, and scales that are buffers
        "HrmTextForCausalLM",  # files hold tensors that it splits
        "OPTForCausalLM",  # its head calls the decoder in the trunk
        "Phi3ForCausalLM",
        "Qwen3ForCausalLM",
    ),
    "mixtures of experts": (
        "MixtralForCausalLM",  # experts that are stacked
        "DeepseekV3ForCausalLM",  # its router has a correction that is a buffer
        "GptOssForCausalLM",
        "LagunaForCausalLM",  # patterns of old names match today's
        "Qwen3MoeForCausalLM",
    ),
    "state spaces and hybrids": (
        "FalconH1ForCausalLM",  # its head reads a setting of the trunk
        "JambaForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",  # its head passes the trunk's cache on
        "RecurrentGemmaForCausalLM",
        "RwkvForCausalLM",
        "ZambaForCausalLM",  # has blocks that share weights
        "ZayaForCausalLM",  # hands more than hidden states from block to block
    ),
    "encoders": (
        "BertForSequenceClassification",
        "AlbertForSequenceClassification",  # has one block for all layers
        "DebertaV2ForSequenceClassification",
        "DistilBertForSequenceClassification",
        "ElectraForSequenceClassification",
        "LongformerForSequenceClassification",  # its head tells the trunk where to look at all tokens
        "ModernBertForSequenceClassification",
        "RobertaForSequenceClassification",  # numbers positions from behind its padding token
        "XLNetForSequenceClassification",  # has its samples in columns
    ),
    "encoder-decoders": (
        "T5ForConditionalGeneration",
        "BartForConditionalGeneration",
        "BartForSequenceClassification",  # its head looks for the end of the text
        "MarianMTModel",
    ),
    "vision": (
        "ViTForImageClassification",
        "BeitForImageClassification",  # has tables of relative positions
        "Dinov2ForImageClassification",  # its head reads all patches
        "ConvNextForImageClassification",
        "ResNetForImageClassification",  # has running means
        "SegformerForSemanticSegmentation",
        "SwinForImageClassification",
    ),
    "speech": (
        "WhisperForConditionalGeneration",
        "MoonshineForConditionalGeneration",
        "Wav2Vec2ForCTC",  # has a weight in two factors
    ),
    "vision and language": (
        "CLIPModel",
        "Blip2ForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Idefics3ForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "SiglipModel",
    ),
}
"""Classes of networks by family."""
