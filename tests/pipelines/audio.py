"""Audio."""

from __future__ import annotations

from typing import Any

import diffusers as df

from pipelines.parts import assemble, case, letters, make, t5


@case("StableAudioPipeline", family="Stable Audio", call={"audio_end_in_s": 2.0})
def _() -> Any:
    vae = make(
        df.AutoencoderOobleck,
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=3,
        audio_channels=2,
        sampling_rate=4,
    )
    transformer = make(
        df.StableAudioDiTModel,
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=16,
        time_proj_dim=8,
        global_states_input_dim=32,
        cross_attention_input_dim=16,
    )
    projection = make(
        df.StableAudioProjectionModel, text_encoder_dim=16, conditioning_dim=16, min_value=0, max_value=32
    )
    return assemble(
        df.StableAudioPipeline,
        vae=vae,
        text_encoder=t5(),
        projection_model=projection,
        tokenizer=letters(8),
        transformer=transformer,
        scheduler=df.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )
