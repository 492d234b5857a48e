"""timm names that the conversion tests cover, each with the arguments that keep it small (fewer blocks, same blocks)."""

VIT = {"depth": 2}
SWIN = {"depths": (1, 1, 2, 1)}  # the third stage has a shifted block

# name -> (arguments, resolution other than the name's own)
NAMES = {
    "vit_tiny_patch16_224": (VIT, 160),
    "vit_small_patch16_224": (VIT, 256),
    "vit_small_patch32_224": (VIT, 384),
    "vit_base_patch16_224": (VIT, 128),
    "vit_base_patch8_224": ({"depth": 1, "img_size": 112}, 64),
    "vit_large_patch16_224": ({"depth": 1}, 96),
    "vit_large_patch14_clip_224": ({"depth": 1}, 98),
    "vit_base_patch16_clip_224": (VIT, 160),
    "vit_base_patch32_clip_quickgelu_224": (VIT, 256),
    "vit_small_patch14_dinov2": ({**VIT, "img_size": 224}, 126),
    "vit_small_patch14_reg4_dinov2": ({**VIT, "img_size": 224}, 126),
    "vit_giant_patch14_dinov2": ({**VIT, "img_size": 224, "embed_dim": 192, "num_heads": 3}, 126),  # packed SwiGLU
    "aimv2_large_patch14_224": ({"depth": 1, "embed_dim": 192, "num_heads": 3}, 126),  # RMSNorm, SwiGLU
    "vit_medium_patch16_gap_240": (VIT, 224),
    "vit_little_patch16_reg4_gap_256": (VIT, 192),
    "vit_wee_patch16_reg1_gap_256": (VIT, 160),
    "vit_base_patch16_siglip_224": (VIT, 128),  # attention pooling
    "vit_base_patch16_rpn_224": (VIT, 128),  # norm after the branch
    "vit_small_patch16_18x2_224": (VIT, 128),  # two attentions, two MLPs a block
    "vit_small_patch16_36x1_224": (VIT, 160),
    "vit_base_patch16_xp_224": (VIT, 128),  # qk-norm, RMSNorm, attention and MLP in parallel
    "vit_dpwee_patch16_reg1_gap_256": (VIT, 128),  # differential attention in a parallel block
    "vit_dwee_patch16_reg1_gap_256": (VIT, 128),  # differential attention
    "vit_pwee_patch16_reg1_gap_256": (VIT, 128),
    "vit_tiny_r_s16_p8_224": (VIT, 160),  # convolutional stem
    "vit_base_mci_224": (VIT, 160),
    "deit_tiny_patch16_224": (VIT, 256),
    "deit_small_patch16_224": (VIT, 192),
    "deit_base_patch16_224": (VIT, 112),
    "deit_tiny_distilled_patch16_224": (VIT, 160),
    "deit_base_distilled_patch16_384": ({**VIT, "img_size": 224}, 128),
    "deit3_small_patch16_224": (VIT, 160),
    "deit3_medium_patch16_224": (VIT, 128),
    "deit3_large_patch16_224": ({"depth": 1}, 96),
    "swin_tiny_patch4_window7_224": (SWIN, 256),
    "swin_small_patch4_window7_224": (SWIN, 192),
    "swin_base_patch4_window7_224": (SWIN, 128),
    "swin_s3_tiny_224": (SWIN, 256),
}
