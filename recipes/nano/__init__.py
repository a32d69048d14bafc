"""nano: how the small embedded model is made, from public pictures to a diffusers folder."""
